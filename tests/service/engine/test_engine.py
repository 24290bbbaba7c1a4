"""The engine on tiny real models, against PyTorch written plainly and against itself in other company."""

import gc
import itertools
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.attribution import Coefficients
from energy.types import UNSHARED, Load, Phase, Step, Work
from models.graph import KEY_BLOCK, Scheme
from models.manifest import ArtefactError
from service.engine import buffers, executor, workers
from service.engine.engine import Engine, Recorder
from service.engine.loading import core_groups
from service.engine.settings import EngineSettings
from service.engine.types import (
    EncodeItem,
    EncodeOutput,
    EngineClosed,
    ExtractItem,
    Item,
    Output,
    Overloaded,
    Sampling,
    Ticket,
    WriteItem,
    WriteOutput,
)
from tests.energy.fakes import weigh
from tests.service.engine.reference import beam_search, greedy, next_log_probabilities
from tests.tiny import BOS, EOS, WRITERS, Kind, Loaded, load_tiny, tiny_transformer

WAIT_S = 30.0
QUANTISED: tuple[tuple[str, Kind, Scheme], ...] = (
    ("blocks", "encoder-decoder", "blockwise"),
    ("rows", "encoder-decoder", "rowwise"),
    ("decoder-rows", "decoder", "rowwise"),
)
ALL_WRITERS = (*WRITERS, *(name for name, _, _ in QUANTISED))


class Steps:
    """A recorder that keeps every step, and can hold the executor inside one."""

    def __init__(self) -> None:
        self.all: list[Step] = []
        self.go = threading.Event()
        self.go.set()
        self.held = threading.Event()

    def __call__(self, step: Step) -> None:
        self.all.append(step)
        if step.work is not None and not self.go.is_set():
            self.held.set()
            self.go.wait(WAIT_S)

    @property
    def worked(self) -> list[Step]:
        """All but the warm-up."""
        return [step for step in self.all if step.work is not None]

    @property
    def works(self) -> list[Work]:
        return [step.work for step in self.all if step.work is not None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("classify", "span", "bert-span", *WRITERS)
    loaded: dict[str, Loaded] = {kind: load_tiny(root, kind) for kind in kinds}
    for name, kind, scheme in QUANTISED:
        loaded[name] = load_tiny(root, kind, name, scheme=scheme)
    return loaded


@contextmanager
def engine(
    models: Mapping[str, Loaded], names: Sequence[str], recorder: Recorder | None = None, **limits: int
) -> Iterator[Engine]:
    running = Engine({name: models[name] for name in names}, recorder or Steps(), EngineSettings(**limits))
    try:
        yield running
    finally:
        running.close()


def ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(6, 90, length).tolist())


def write(number: int, length: int, **how: Any) -> WriteItem:
    return WriteItem(f"request-{number}", ids(number, length), Sampling(**{"max_tokens": 12, **how}))


def results(tickets: Sequence[Ticket]) -> list[Output]:
    return [ticket.future.result(WAIT_S) for ticket in tickets]


def texts(tickets: Sequence[Ticket]) -> list[tuple[tuple[int, ...], str]]:
    outputs = results(tickets)
    assert all(isinstance(output, WriteOutput) for output in outputs)
    return [(output.output_ids, output.finish_reason) for output in outputs if isinstance(output, WriteOutput)]


SEEDS = range(10)
LENGTHS = [9, 1, 20, 5, 13, 3, 30, 2, 8, 11]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("how", [{}, {"no_repeat_ngram": 2}, {"beams": 3}, {"beams": 4, "length_penalty": 0.4}])
def test_texts_equal_a_plain_pytorch_loop(models: dict[str, Loaded], kind: Kind, how: dict[str, Any]) -> None:
    items = [write(seed, length, **how) for seed, length in zip(SEEDS, LENGTHS, strict=True)]
    with engine(models, [kind], max_rows=10) as running:
        written = texts(running.submit(kind, items))
    model = tiny_transformer(models[kind].manifest.config)
    reference = beam_search if "beams" in how else greedy
    for item, text in zip(items, written, strict=True):
        expected, reason = reference(model, list(item.input_ids), item.sampling, BOS, EOS)
        assert text == (tuple(expected), reason)


def test_the_tiny_models_write_texts_of_different_lengths(models: dict[str, Loaded]) -> None:
    """Or the tests of joining and leaving would prove little."""
    for kind in WRITERS:
        with engine(models, [kind]) as running:
            written = texts(running.submit(kind, [write(seed, 5, max_tokens=30) for seed in range(40)]))
        assert len({ids for ids, _ in written}) > 20


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
def test_encoders_equal_pytorch(models: dict[str, Loaded], kind: Kind) -> None:
    config = models[kind].manifest.config
    model = tiny_transformer(config)
    items = []
    for seed, length in zip(SEEDS, LENGTHS, strict=True):
        types = tuple((np.arange(length) > length // 2).astype(int).tolist()) if config.n_token_types else ()
        items.append(EncodeItem(f"request-{seed}", ids(seed, length), types if seed % 2 else ()))
    with engine(models, [kind]) as running:
        outputs = results(running.submit(kind, items))
    for item, output in zip(items, outputs, strict=True):
        lengths = torch.tensor([len(item.input_ids)])
        token_types = torch.tensor([item.token_types]) if item.token_types else None
        with torch.no_grad():
            hidden = model.encode(torch.tensor([item.input_ids]), lengths, token_types)
            logits = model.label_logits(hidden, lengths) if kind == "classify" else model.span_logits(hidden)
        assert isinstance(output, EncodeOutput)
        np.testing.assert_allclose(output.logits, logits[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["prefix-lm", "bert-prefix-lm"])
def test_documents_are_scored_between_texts_that_are_written(models: dict[str, Loaded], kind: Kind) -> None:
    model = tiny_transformer(models[kind].manifest.config)
    with engine(models, [kind], max_rows=6) as running:
        alone = texts(running.submit(kind, [write(1, 7, beams=3)]))
        mixed: list[Item] = [ExtractItem("a", ids(2, 15)), write(1, 7, beams=3), ExtractItem("b", ids(3, 6))]
        tickets = running.submit(kind, mixed)
        assert texts(tickets[1:2]) == alone
        for item, output in zip((mixed[0], mixed[2]), results([tickets[0], tickets[2]]), strict=True):
            lengths = torch.tensor([len(item.input_ids)])
            with torch.no_grad():
                expected = model.extract_logits(model.decode(torch.tensor([item.input_ids]), prefix_lengths=lengths))
            assert isinstance(output, EncodeOutput)
            np.testing.assert_allclose(output.logits, expected[0].numpy(), atol=1e-4)


MIXED = [
    write(0, 9),
    write(1, 1, beams=3),
    write(2, 20, temperature=1.0, seed=7),
    write(3, 5, temperature=0.8, seed=8, top_k=5, top_p=0.9),
    write(4, 13, no_repeat_ngram=1, max_tokens=3),
    write(5, 30, beams=2, length_penalty=2.0),
    write(6, 2, max_tokens=1),
    write(7, 8, temperature=1.5, seed=7, max_tokens=20),
]


@pytest.mark.parametrize("name", ALL_WRITERS)
def test_a_text_is_the_same_alone_and_in_any_company(models: dict[str, Loaded], name: str) -> None:
    """Greedy, drawn and beams; the same seed gives the same text."""
    with engine(models, [name], executors=2, max_rows=7) as running:
        alone = [texts(running.submit(name, [item]))[0] for item in MIXED]
        assert texts(running.submit(name, MIXED)) == alone
        assert texts(running.submit(name, MIXED[::-1] * 2)) == (alone[::-1] * 2)


LONG = [
    write(seed, length, **how) for seed, length, how in [(0, 40, {}), (1, 51, {"beams": 3}), (2, 30, {}), (3, 5, {})]
]


@pytest.mark.parametrize("name", ["decoder", "decoder-rows"])
def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others(models: dict[str, Loaded], name: str) -> None:
    steps = Steps()
    with engine(models, [name], prefix_bytes=0) as running:
        whole = [texts(running.submit(name, [item]))[0] for item in LONG]
    with engine(models, [name], steps, prefix_bytes=0, max_piece_tokens=16) as running:
        steps.go.clear()
        tickets = running.submit(name, [write(9, 4, max_tokens=40, no_repeat_ngram=1)])
        assert steps.held.wait(WAIT_S)
        tickets += running.submit(name, LONG)
        steps.go.set()
        assert texts(tickets)[1:] == whole
    reads = [
        (number, *work.tokens, *work.context_tokens)
        for number, work in enumerate(steps.works)
        if work.request_ids == ["request-1"] and work.phase is Phase.PREFILL
    ]
    assert [(tokens, context) for _, tokens, context in reads] == [(16, 0), (16, 16), (16, 32), (3, 48)]
    assert all(later - earlier == 2 for (earlier, *_), (later, *_) in itertools.pairwise(reads))


@pytest.mark.parametrize("name", ["decoder", "decoder-rows"])
def test_a_known_beginning_is_not_read_again(models: dict[str, Loaded], name: str) -> None:
    system = ids(50, 34)
    items = [
        WriteItem(f"request-{number}", (*system, *ids(number, 4 + number)), Sampling(max_tokens=9, beams=beams))
        for number, beams in enumerate([1, 1, 2, 1])
    ]
    with engine(models, [name], prefix_bytes=0) as running:
        expected = [texts(running.submit(name, [item]))[0] for item in items]
    steps = Steps()
    with engine(models, [name], steps) as running:
        assert [texts(running.submit(name, [item]))[0] for item in items] == expected
        assert texts(running.submit(name, items)) == expected
    read = [tokens for work in steps.works if work.phase is Phase.PREFILL for tokens in work.tokens]
    assert read == [38, 5, 6, 7, 1, 1, 1, 1]


def test_executors_divide_the_tokens_of_what_waits(models: dict[str, Loaded]) -> None:
    steps = Steps()
    items = [EncodeItem(f"{length}", ids(length, length)) for length in (11, 5, 21, 14, 15, 35, 7, 26)]
    with engine(models, ["classify"], steps, executors=2) as running:
        results(running.submit("classify", items))
    # Of 134 tokens, the two longest of eight texts are nearly half.
    assert steps.worked[0].tokens in (73, 61)


def test_what_several_items_read_is_read_once(models: dict[str, Loaded]) -> None:
    """A source that many start from, as when a client asks for several texts."""
    item = write(1, 9, temperature=1.0)
    alone, other = replace(item, sampling=replace(item.sampling, seed=5)), write(2, 6)
    with engine(models, ["encoder-decoder"]) as running:
        expected = [texts(running.submit("encoder-decoder", [each]))[0] for each in (alone, other)]
        assert texts(running.submit("encoder-decoder", [alone, other, alone])) == [*expected, expected[0]]


def test_an_item_that_comes_again_is_not_computed_again(models: dict[str, Loaded]) -> None:
    steps = Steps()
    again: list[Item] = [write(1, 9), write(2, 9, beams=2), write(3, 9, temperature=1.0, seed=5)]
    with engine(models, ["decoder", "classify"], steps, reuse_bytes=100_000, prefix_bytes=0) as running:
        first = texts(running.submit("decoder", again))
        scores = results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))
        n_steps = len(steps.all)
        assert texts(running.submit("decoder", again)) == first
        [repeated] = results(running.submit("classify", [EncodeItem("d", ids(0, 5))]))
        assert isinstance(repeated, EncodeOutput) and isinstance(scores[0], EncodeOutput)
        assert (repeated.logits == scores[0].logits).all()
        assert (repeated.timing.queue_ns, repeated.timing.compute_ns) == (0, 0)
        assert len(steps.all) == n_steps
        # By chance, followed, or another: computed.
        fresh = [write(1, 9, temperature=1.0), replace(write(1, 9), on_tokens=lambda ids: None), write(1, 8)]
        for item in fresh:
            texts(running.submit("decoder", [item]))
            assert len(steps.all) > n_steps
            n_steps = len(steps.all)
    with engine(models, ["decoder"], steps) as running:
        for _ in range(2):
            texts(running.submit("decoder", again[:1]))
            assert len(steps.all) > n_steps
            n_steps = len(steps.all)


def test_two_seeds_write_two_texts(models: dict[str, Loaded]) -> None:
    items = [write(1, 9, temperature=1.5, seed=seed, max_tokens=20) for seed in range(5)]
    with engine(models, ["decoder"]) as running:
        assert len(set(texts(running.submit("decoder", items)))) == 5
        fresh = [write(1, 9, temperature=1.5, max_tokens=20)] * 20
        # One or two may happen to be like another, as of some nothing is written.
        assert len(set(texts(running.submit("decoder", fresh)))) >= 18


@settings(max_examples=25)
@given(data=st.data())
def test_no_row_ever_sees_anothers_cache(models: dict[str, Loaded], solo: dict[str, Any], data: st.DataObject) -> None:
    """Any schedule of joins, leaves and departures gives everybody the text that they get alone."""
    name = data.draw(st.sampled_from(ALL_WRITERS))
    running: Engine = solo["engine"]
    alone: list[tuple[tuple[int, ...], str]] = solo[name]
    waiting: list[tuple[int, Ticket]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        chosen = data.draw(st.lists(st.integers(0, len(MIXED) - 1), min_size=1, max_size=5))
        waiting += zip(chosen, running.submit(name, [MIXED[number] for number in chosen]), strict=True)
        if data.draw(st.booleans()):
            waiting[data.draw(st.integers(0, len(waiting) - 1))][1].future.cancel()
        time.sleep(data.draw(st.sampled_from([0.0, 0.0005, 0.002])))
    for number, ticket in waiting:
        if not ticket.future.cancelled():
            assert texts([ticket]) == [alone[number]]


@pytest.fixture(scope="module")
def solo(models: dict[str, Loaded]) -> Iterator[dict[str, Any]]:
    """An engine with few rows, and what each of ``MIXED`` gets alone in it."""
    with engine(models, ALL_WRITERS, max_rows=5) as running:
        alone = {name: [texts(running.submit(name, [item]))[0] for item in MIXED] for name in ALL_WRITERS}
        yield {"engine": running, **alone}


def test_a_stop_callback_ends_a_text(models: dict[str, Loaded]) -> None:
    with engine(models, ["decoder"]) as running:
        [(whole, _)] = texts(running.submit("decoder", [write(0, 9)]))
        seen: list[tuple[int, ...]] = []

        def should_stop(written: Sequence[int]) -> bool:
            seen.append(tuple(written))
            return len(written) == 4

        item = replace(write(0, 9), should_stop=should_stop)
        assert texts(running.submit("decoder", [item])) == [(whole[:4], "stop")]
        assert seen == [whole[:length] for length in range(1, 5)]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_callback_may_say_why(models: dict[str, Loaded], beams: int) -> None:
    with engine(models, ["decoder"]) as running:
        item = replace(write(0, 9, beams=beams), should_stop=lambda ids: "energy_budget" if len(ids) == 4 else False)
        [(ids, reason)] = texts(running.submit("decoder", [item]))
        assert (len(ids), reason) == (4, "energy_budget")
        # The rows are free again.
        assert len(texts(running.submit("decoder", [write(seed, 9) for seed in range(4)]))) == 4


def test_stop_texts_do_not_end_a_beam_search(models: dict[str, Loaded]) -> None:
    with engine(models, ["decoder"]) as running:
        whole = texts(running.submit("decoder", [write(0, 9, beams=3)]))
        assert texts(running.submit("decoder", [replace(write(0, 9, beams=3), should_stop=lambda ids: True)])) == whole


@pytest.mark.parametrize("beams", [1, 3])
def test_a_callback_that_raises_ends_its_own_text_only(models: dict[str, Loaded], beams: int) -> None:
    def should_stop(written: Sequence[int]) -> bool:
        raise RuntimeError("a stop text that cannot be decoded")

    with engine(models, ["decoder"]) as running:
        wrong = replace(write(1, 9, beams=beams), should_stop=should_stop)
        good, bad = running.submit("decoder", [write(0, 9, beams=beams), wrong])
        with pytest.raises(RuntimeError, match="cannot be decoded"):
            bad.future.result(WAIT_S)
        assert len(texts([good])[0][0]) > 0


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_are_told_as_they_are_written(models: dict[str, Loaded], kind: Kind) -> None:
    told: list[list[tuple[int, ...]]] = [[], [], []]

    def listener(number: int) -> Callable[[Sequence[int]], None]:
        return lambda written: told[number].append(tuple(written))

    items = [replace(write(number, 9 + number), on_tokens=listener(number)) for number in range(3)]
    with engine(models, [kind]) as running:
        written = texts(running.submit(kind, items))
    for each, (output, _) in zip(told, written, strict=True):
        assert each == [output[:length] for length in range(1, len(output) + 1)]


@pytest.mark.parametrize("kind", WRITERS)
def test_probabilities_are_the_models_own(models: dict[str, Loaded], kind: Kind) -> None:
    how = {"logprobs": 3, "temperature": 2.0, "top_k": 2, "seed": 1, "no_repeat_ngram": 2}
    plain, asked = write(4, 9), write(4, 9, **how)
    with engine(models, [kind]) as running:
        silent, output = results(running.submit(kind, [plain, asked]))
    assert isinstance(silent, WriteOutput) and isinstance(output, WriteOutput)
    assert silent.logprobs == ()
    assert len(output.logprobs) == len(output.output_ids) > 1
    model = tiny_transformer(models[kind].manifest.config)
    for place, (token, told) in enumerate(zip(output.output_ids, output.logprobs, strict=True)):
        expected = next_log_probabilities(model, list(asked.input_ids), list(output.output_ids[:place]), BOS)
        assert told.logprob == pytest.approx(float(expected[token]), abs=1e-3)
        best = torch.topk(expected, 3)
        assert [each for each, _ in told.likeliest] == best.indices.tolist()
        assert [logprob for _, logprob in told.likeliest] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("kind", ["decoder", "prefix-lm"])
def test_a_text_ends_where_the_positions_do(models: dict[str, Loaded], kind: Kind) -> None:
    limit = models[kind].manifest.config.max_positions
    with engine(models, [kind]) as running:
        cramped = [write(seed, limit - 4, max_tokens=30, temperature=1.0, seed=seed) for seed in range(4)]
        for written, reason in texts(running.submit(kind, cramped)):
            assert len(written) <= 4 and (len(written) == 4) == (reason == "length")
        with pytest.raises(ValueError, match="64 tokens"):
            running.submit(kind, [write(0, limit)])


def test_every_step_names_its_work(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_LONG_NS", 10**15)
    steps = Steps()
    with engine(models, ["encoder-decoder", "decoder", "classify"], steps) as running:
        results(running.submit("classify", [EncodeItem("c", ids(0, 5)), EncodeItem("d", ids(1, 7))]))
        results(running.submit("decoder", [write(0, 9, max_tokens=4, no_repeat_ngram=1)]))
        results(running.submit("encoder-decoder", [write(1, 6, max_tokens=3, beams=2)]))
        assert (running.queue_depth(), running.running()) == (0, 0)
    names = ["encoder-decoder", "decoder", "classify"]
    assert [(step.device, step.model) for step in steps.all[:6]] == [("cpu", name) for name in names] + [
        ("cpu:0", name) for name in names
    ]  # loading, and warm-up
    assert all(step.cpu_ns > 0 and step.work is None for step in steps.all[:6])
    steps.all = steps.all[3:]
    said = [
        (step.model, work.phase, work.request_ids, step.tokens, step.context_tokens)
        for step, work in zip(steps.worked, steps.works, strict=True)
    ]
    assert said[0] == ("classify", Phase.ENCODE, ["c", "d"], 5 + 7, 0)
    assert steps.works[0] == Work(Phase.ENCODE, ["c", "d"], [5, 7])
    assert steps.worked[0].padding_tokens == 2 * 8 - 12
    # The prompt's last position writes the first of four tokens; nothing comes between the passes for the others.
    assert said[1:3] == [
        ("decoder", Phase.PREFILL, ["request-0"], 9, 0),
        ("decoder", Phase.DECODE, ["request-0"], 3, 9 + 10 + 11),
    ]
    # Two beams read a token each, and look back on what they have written and on the source.
    assert said[3:] == [
        ("encoder-decoder", Phase.ENCODE, ["request-1"], 6, 0),
        ("encoder-decoder", Phase.DECODE, ["request-1"], 3 * 2, 2 * (6 + 7 + 8)),
    ]
    assert [step.passes for step in steps.worked] == [1, 1, 3, 1, 3]
    assert all(step.device == "cpu:0" and 0 < step.cpu_ns <= step.ended_ns - step.started_ns for step in steps.all)
    ends = [step.ended_ns for step in steps.all]
    assert all(end <= step.started_ns for end, step in zip(ends, steps.all[1:], strict=False))


@pytest.mark.parametrize("is_held", [True, False])
def test_a_source_waits_until_it_is_worth_a_step(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    monkeypatch.setattr(executor, "_LONG_NS", 10**15)
    monkeypatch.setattr(workers, "_HELD_NS", 10**15 if is_held else -1)
    steps = Steps()
    steps.go.clear()
    with engine(models, ["encoder-decoder"], steps) as running:
        items = [write(number, 6, no_repeat_ngram=1, max_tokens=3 + 2 * number) for number in range(8)]
        eight = running.submit("encoder-decoder", items)
        assert steps.held.wait(WAIT_S)
        late = running.submit("encoder-decoder", [write(9, 6, no_repeat_ngram=1)])
        steps.go.set()
        results([*eight, *late])
    said = [(work.phase, len(work.request_ids)) for work in steps.works]
    assert said[0] == (Phase.ENCODE, 8)
    if is_held:
        # One step goes on until the first of eight ends; for seven that are left one is enough.
        assert said[1:4] == [(Phase.DECODE, 8), (Phase.ENCODE, 1), (Phase.DECODE, 8)]
        assert steps.worked[1].passes > 1
    else:
        assert said[1:3] == [(Phase.ENCODE, 1), (Phase.DECODE, 9)]


def test_an_output_says_where_its_time_went(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["decoder"], steps) as running:
        submitted_ns = time.monotonic_ns()
        [output] = results(running.submit("decoder", [write(0, 9)]))
    assert output.timing.compute_ns == sum(step.ended_ns - step.started_ns for step in steps.worked)
    assert 0 < output.timing.queue_ns <= steps.worked[0].started_ns - submitted_ns


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "classify"])
def test_an_output_says_about_what_fell_to_it_of_the_loads_of_its_steps(models: dict[str, Loaded], kind: str) -> None:
    steps, coefficients = Steps(), Coefficients(9000, prefill_token=700, decode_token=1500, context_token=6)
    items = [write(0, 40), write(1, 20), write(2, 30, max_tokens=2)]
    if kind == "classify":
        items = [EncodeItem(item.request_id, item.input_ids) for item in items]
    name = models[kind].manifest.name
    running = Engine({kind: models[kind]}, steps, EngineSettings(executors=1), {name: coefficients})
    try:
        outputs = results(running.submit(kind, items))
    finally:
        running.close()
    exact_ns: Counter[str] = Counter()
    for step, work in zip(steps.worked, steps.works, strict=True):
        heavy = weigh(work, coefficients, step.passes)
        exact_ns.update(
            {name: step.load_ns * own / sum(heavy) for name, own in zip(work.request_ids, heavy, strict=True)}
        )
    loads = [output.timing.load for output in outputs]
    assert [load.device for load in loads] == ["cpu:0"] * 3
    assert sum(load.load_ns for load in loads) == pytest.approx(sum(step.load_ns for step in steps.worked))
    for item, load in zip(items, loads, strict=True):
        assert load.load_ns == pytest.approx(exact_ns[item.request_id])


def test_without_coefficients_nothing_is_said_of_loads(models: dict[str, Loaded]) -> None:
    steps = Steps()
    running = Engine({"decoder": models["decoder"]}, steps, EngineSettings(executors=1), None)
    try:
        outputs = results(running.submit("decoder", [write(0, 9), write(1, 5)]))
    finally:
        running.close()
    assert [output.timing.load for output in outputs] == [Load("cpu:0", 0.0)] * 2
    assert {step.shares for step in steps.worked} == {UNSHARED}


def test_a_step_is_recorded_before_its_items_are_answered(models: dict[str, Loaded]) -> None:
    steps = Steps()
    steps.go.clear()
    with engine(models, ["classify"], steps) as running:
        [ticket] = running.submit("classify", [EncodeItem("c", ids(0, 5))])
        assert steps.held.wait(WAIT_S)
        assert not ticket.future.done()
        steps.go.set()
        results([ticket])


def test_a_recorder_that_raises_stops_nobody(models: dict[str, Loaded], caplog: pytest.LogCaptureFixture) -> None:
    def recorder(step: Step) -> None:
        raise OSError("the disk is full")

    with engine(models, ["classify"], recorder) as running:
        results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))
    assert "was not recorded" in caplog.text


def test_a_cancelled_item_frees_its_rows(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["decoder"], steps, max_rows=2) as running:
        steps.go.clear()
        long, gone, waiting = running.submit(
            "decoder",
            [write(seed, 5, max_tokens=40, no_repeat_ngram=1) for seed in range(3)],
        )
        assert steps.held.wait(WAIT_S)
        assert running.running() == 2 and running.queue_depth() == 1
        gone.future.cancel()
        steps.go.set()
        results([long, waiting])
    took_part = [set(work.request_ids) for work in steps.works]
    assert sum("request-1" in names for names in took_part) == 1
    assert {"request-0", "request-2"} in took_part  # the freed row was used beside the other's


def test_items_cancelled_in_the_queue_are_never_computed(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["classify"], steps) as running:
        steps.go.clear()
        [first] = running.submit("classify", [EncodeItem("first", ids(0, 5))])
        assert steps.held.wait(WAIT_S)
        others = running.submit("classify", [EncodeItem(f"r{seed}", ids(seed, 5)) for seed in range(4)])
        for ticket in others[:3]:
            ticket.future.cancel()
        steps.go.set()
        results([first, others[3]])
        assert running.queue_depth() == 0
    assert [name for work in steps.works for name in work.request_ids] == ["first", "r3"]


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "classify"])
def test_how_fast_tokens_leave_the_queue_is_told_once_of_each(models: dict[str, Loaded], kind: str) -> None:
    told: list[int] = []
    items: list[Item] = [write(0, 40), write(1, 20), write(2, 7)]
    if kind == "classify":
        items = [EncodeItem(item.request_id, item.input_ids) for item in items]
    with engine(models, [kind], max_piece_tokens=16) as running:
        stepped = running._backlog.stepped
        running._backlog.stepped = lambda tokens, seconds: (told.append(tokens), stepped(tokens, seconds))[1]
        results(running.submit(kind, items))
    assert sum(told) == 40 + 20 + 7


def test_a_full_queue_refuses_the_whole_submission(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["classify"], steps, max_waiting_items=4, max_waiting_tokens=30) as running:
        steps.go.clear()
        tickets = running.submit("classify", [EncodeItem("a", ids(0, 5))])
        assert steps.held.wait(WAIT_S)
        tickets += running.submit("classify", [EncodeItem("b", ids(1, 5)) for _ in range(3)])
        with pytest.raises(Overloaded) as refusal:
            running.submit("classify", [EncodeItem("c", ids(2, 5)) for _ in range(2)])
        assert 0.1 <= refusal.value.retry_after_s <= 60
        with pytest.raises(Overloaded):
            running.submit("classify", [EncodeItem("d", ids(3, 16))])
        assert running.queue_depth() == 3
        # Places of those who left are free at once.
        tickets[1].future.cancel()
        tickets += running.submit("classify", [EncodeItem("c", ids(2, 5)) for _ in range(2)])
        steps.go.set()
        results([ticket for ticket in tickets if not ticket.future.cancelled()])


def test_models_take_turns(models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text does not keep another model's short work waiting."""
    # However short a pass is.
    monkeypatch.setattr(executor, "_SHARED_NS", 0)
    steps = Steps()
    with engine(models, ["decoder", "encoder-decoder", "classify"], steps) as running:
        steps.go.clear()
        tickets = running.submit("decoder", [write(0, 5, max_tokens=30, no_repeat_ngram=1)])
        assert steps.held.wait(WAIT_S)
        tickets += running.submit("encoder-decoder", [write(1, 5, max_tokens=10, no_repeat_ngram=1)])
        tickets += running.submit("classify", [EncodeItem("c", ids(0, 5))])
        steps.go.set()
        results(tickets)
    order = [step.model for step in steps.worked]
    assert order.index("classify") <= 3
    writing = [model for model in order if model != "classify"]
    first = writing.index("encoder-decoder")
    assert writing[first : first + 10] == ["encoder-decoder", "decoder"] * 5


def test_executors_share_a_batch_and_its_weights(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["decoder"], steps, executors=2) as running:
        items = [write(seed, 9, max_tokens=30, no_repeat_ngram=1) for seed in range(8)]
        written = texts(running.submit("decoder", items))
    by_device: dict[str, set[str]] = {"cpu:0": set(), "cpu:1": set()}
    for step, work in zip(steps.worked, steps.works, strict=True):
        by_device[step.device] |= set(work.request_ids)
    assert [len(names) for names in by_device.values()] == [4, 4]
    with engine(models, ["decoder"]) as running:
        assert texts(running.submit("decoder", items)) == written


def test_an_executor_of_two_threads_writes_the_same(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["decoder"]) as running:
        expected = texts(running.submit("decoder", MIXED))
    with engine(models, ["decoder"], steps, threads=2) as running:
        assert texts(running.submit("decoder", MIXED)) == expected
    assert all(0 < step.cpu_ns <= 2 * (step.ended_ns - step.started_ns) for step in steps.all)


def test_a_step_that_raises_fails_its_own_items_only(
    models: dict[str, Loaded], caplog: pytest.LogCaptureFixture
) -> None:
    """The manifest promises more words than the graph has, so that the last ones are an error inside the step."""
    honest = models["classify"].manifest
    larger = honest.config.model_copy(update={"vocab_size": 1000})
    lying = {
        "lying": replace(models["classify"], manifest=honest.model_copy(update={"name": "lying", "config": larger}))
    }
    steps = Steps()
    with engine(models | lying, ["lying", "classify"], steps) as running:
        bad, near = running.submit("lying", [EncodeItem("bad", (7, 999)), EncodeItem("near", (7, 8, 9))])
        [good] = running.submit("classify", [EncodeItem("good", (7, 8))])
        for ticket in (bad, near):
            with pytest.raises(Exception, match="out of data bounds"):
                ticket.future.result(WAIT_S)
        results([good])
        results(running.submit("lying", [EncodeItem("later", (7, 8))]))
        assert running.running() == 0
    assert "a step of lying failed" in caplog.text
    # What it used until it failed is on the bill all the same.
    assert {name for work in steps.works for name in work.request_ids} == {"bad", "near", "good", "later"}


@pytest.mark.parametrize(
    ("name", "item", "message"),
    [
        ("classify", write(0, 3), "does not take an item of the kind WriteItem"),
        ("classify", ExtractItem("r", (7,)), "does not take an item of the kind ExtractItem"),
        ("decoder", EncodeItem("r", (7,)), "does not take an item of the kind EncodeItem"),
        ("decoder", ExtractItem("r", (7,)), "does not take an item of the kind ExtractItem"),
        ("classify", EncodeItem("r", ()), "0 tokens"),
        ("classify", EncodeItem("r", ids(0, 65)), "65 tokens"),
        ("classify", EncodeItem("r", (7, 128)), "not one of the"),
        ("classify", EncodeItem("r", (7, -1)), "not one of the"),
        ("bert-span", EncodeItem("r", (7, 8), (0,)), "1 token types for 2 tokens"),
        ("bert-span", EncodeItem("r", (7, 8), (0, 2)), "a token type is not one"),
        ("decoder", write(0, 3, max_tokens=0), "a text of 0 tokens"),
        ("decoder", write(0, 3, beams=0), "0 beams"),
        ("decoder", write(0, 3, beams=129), "129 beams; at most"),
    ],
)
def test_what_a_model_cannot_compute_is_refused_at_the_door(
    models: dict[str, Loaded], name: str, item: Item, message: str
) -> None:
    with engine(models, [name]) as running:
        with pytest.raises(ValueError, match=message):
            running.submit(name, [write(1, 3) if name == "decoder" else EncodeItem("good", (7,)), item])
        assert running.queue_depth() == 0
        with pytest.raises(KeyError):
            running.submit("unknown", [item])


def test_draining_finishes_what_runs_and_refuses_the_rest(models: dict[str, Loaded]) -> None:
    with engine(models, ["decoder"]) as running:
        tickets = running.submit("decoder", [write(seed, 5, max_tokens=30) for seed in range(40)])
        running.drain(WAIT_S)
        assert all(ticket.future.done() for ticket in tickets)
        assert (running.queue_depth(), running.running()) == (0, 0)
        with pytest.raises(EngineClosed):
            running.submit("decoder", [write(0, 5)])
        assert len(texts(tickets)) == 40


def test_draining_does_not_wait_for_those_who_have_gone(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["classify"], steps) as running:
        steps.go.clear()
        running.submit("classify", [EncodeItem("first", ids(0, 5))])
        assert steps.held.wait(WAIT_S)
        [gone] = running.submit("classify", [EncodeItem("gone", ids(1, 5))])
        draining = threading.Thread(target=running.drain, args=(10 * WAIT_S,))
        draining.start()
        with pytest.raises(EngineClosed):
            while True:
                running.submit("classify", [])
        gone.future.cancel()
        steps.go.set()
        draining.join(WAIT_S)
        assert not draining.is_alive()


def test_what_draining_cannot_finish_in_time_fails_at_the_close(models: dict[str, Loaded]) -> None:
    steps = Steps()
    running = Engine({"decoder": models["decoder"]}, steps, EngineSettings(max_rows=1))
    steps.go.clear()
    tickets = running.submit("decoder", [write(seed, 5) for seed in range(3)])
    assert steps.held.wait(WAIT_S)
    running.drain(0.01)
    assert not any(ticket.future.done() for ticket in tickets)
    closing = threading.Thread(target=running.close)
    closing.start()
    steps.go.set()
    closing.join(WAIT_S)
    for ticket in tickets:
        with pytest.raises(EngineClosed):
            ticket.future.result(0)


def test_a_model_that_the_engine_cannot_run_is_an_error_at_the_start(models: dict[str, Loaded]) -> None:
    translator = models["encoder-decoder"].manifest
    ids = translator.special_ids.model_copy(update={"bos": None})
    for change, message in (({"special_ids": ids}, "special id bos"), ({"layout": "optimum"}, "layout optimum")):
        model = replace(models["encoder-decoder"], manifest=translator.model_copy(update=change))
        with pytest.raises(ArtefactError, match=message):
            Engine({"broken": model}, Steps(), EngineSettings())


def test_a_model_gets_the_rows_that_its_memory_holds(models: dict[str, Loaded]) -> None:
    manifest = models["decoder"].manifest
    config = manifest.config
    row = 4 * 2 * config.n_decoder_layers * config.d_model * config.max_positions
    with engine(models, ["decoder"], max_model_bytes=manifest.size_bytes + 3 * row) as running:
        with pytest.raises(ValueError, match="4 beams; at most 3"):
            running.submit("decoder", [write(0, 3, beams=4)])
        assert len(texts(running.submit("decoder", [write(seed, 5, beams=1 + seed % 3) for seed in range(12)]))) == 12
    for limits in ({"max_model_bytes": manifest.size_bytes}, {"max_model_bytes": 1000, "executors": 2}):
        with pytest.raises(ArtefactError, match="raise max_model_mb"):
            Engine({"decoder": models["decoder"]}, Steps(), EngineSettings(**limits))


def test_ten_thousand_requests_leave_nothing_behind(models: dict[str, Loaded]) -> None:
    """Of every kind, some cancelled; what stays allocated and what the engine still holds is as before."""
    names = [*WRITERS, "classify"]
    limits = {"executors": 2, "max_rows": 16, "prefix_bytes": 200_000, "max_waiting_items": 20_000}
    with engine(models, names, lambda step: None, **limits) as running:

        def some(count: int) -> int:
            tickets = []
            for number in range(count):
                name = names[number % len(names)]
                item: Item = EncodeItem("e", ids(number % 50, 9))
                if name != "classify":
                    item = write(number % 50, 5, max_tokens=3, beams=1 + number % 2)
                tickets += running.submit(name, [item])
                if number % 7 == 0:
                    tickets[-1].future.cancel()
            for ticket in tickets:
                if not ticket.future.cancelled():
                    ticket.future.result(WAIT_S * 4)
            return sum(ticket.future.done() for ticket in tickets)

        def held() -> int:
            """Bytes, without those of layouts: there is one for each number of rows, and which come is chance."""
            gc.collect()
            beside = [tracemalloc.Filter(False, f"*/{file}") for file in ("onnxruntime/*", "engine/graphs.py")]
            return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(beside).traces)

        assert some(1000) == 1000
        tracemalloc.start()
        before = held()
        assert some(9000) == 9000
        grown = held() - before
        tracemalloc.stop()
        assert (running.queue_depth(), running.running()) == (0, 0)
        layouts = [each for each in gc.get_objects() if type(each) is ort.IOBinding]
    assert grown < 50_000
    # On two executors, with one beam and with two.
    assert 0 < len(layouts) <= 2 * len(WRITERS) * (16 + 8)


def test_a_graph_that_fails_at_once_is_an_error_at_the_start(models: dict[str, Loaded]) -> None:
    """A decoder in place of an encoder: it loads, and its first run lacks inputs."""
    wrong = replace(models["encoder-decoder"], manifest=models["decoder"].manifest)
    threads = threading.active_count()
    with pytest.raises(Exception, match="source_lengths"):
        Engine({"wrong": wrong}, Steps(), EngineSettings())
    assert threading.active_count() == threads


def test_weights_move_into_large_pages_while_it_serves(
    models: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, go = threading.Event(), threading.Event()

    def move(pages: Collection[int]) -> None:
        moving.set()
        go.wait(WAIT_S)

    monkeypatch.setattr("service.engine.engine.enlarge_pages", move)
    try:
        with engine(models, ["classify"]) as running:
            assert moving.wait(WAIT_S)
            assert len(results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))) == 1
    finally:
        go.set()


def test_cores_are_divided_among_executors() -> None:
    assert core_groups([0, 1, 2, 3], groups=2, threads=2) == [[0, 1], [2, 3]]
    assert core_groups([2, 5, 7], groups=2, threads=1) == [[2], [5]]
    assert core_groups([0], groups=2, threads=1) == [[0], [0]]


def test_buffers_keep_to_the_blocks_of_the_graphs() -> None:
    assert buffers.KEY_BLOCK == KEY_BLOCK


def test_models_come_and_go_while_others_run(models: dict[str, Loaded]) -> None:
    steps = Steps()
    with engine(models, ["decoder", "classify"], steps, executors=2) as running:
        expected = texts(running.submit("decoder", [write(seed, 5) for seed in range(8)]))
        writing = running.submit("decoder", [write(seed, 5, max_tokens=50) for seed in range(8)])
        running.load({"decoder#1": models["decoder"], "encoder-decoder": models["encoder-decoder"]})
        assert [step.model for step in steps.all if step.device == "cpu"][2:] == ["decoder", "encoder-decoder"]
        assert texts(running.submit("decoder#1", [write(seed, 5) for seed in range(8)])) == expected
        assert len(results(running.submit("encoder-decoder", [write(0, 5)]))) == 1
        results(writing)
        running.unload("decoder")
        with pytest.raises(KeyError):
            running.submit("decoder", [write(0, 5)])
        assert texts(running.submit("decoder#1", [write(seed, 5) for seed in range(8)])) == expected
        results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))
        assert (running.queue_depth(), running.running()) == (0, 0)


def test_what_an_unloaded_model_had_not_finished_fails(models: dict[str, Loaded]) -> None:
    steps = Steps()
    steps.go.clear()
    with engine(models, ["decoder", "classify"], steps, max_rows=2) as running:
        tickets = running.submit("decoder", [write(seed, 5, max_tokens=50) for seed in range(4)])
        assert steps.held.wait(WAIT_S)
        unloading = threading.Thread(target=running.unload, args=("decoder",))
        unloading.start()
        steps.go.set()
        unloading.join(WAIT_S)
        for ticket in tickets:
            with pytest.raises(EngineClosed, match="unloaded"):
                ticket.future.result(0)
        assert (running.queue_depth(), running.running()) == (0, 0)
        results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone(models: dict[str, Loaded]) -> None:
    wrong = replace(models["encoder-decoder"], manifest=models["decoder"].manifest)
    with engine(models, ["classify"], executors=2) as running:
        with pytest.raises(Exception, match="source_lengths"):
            running.load({"wrong": wrong})
        with pytest.raises(KeyError):
            running.submit("wrong", [write(0, 5)])
        results(running.submit("classify", [EncodeItem("c", ids(0, 5))]))
        running.load({"decoder": models["decoder"]})
        results(running.submit("decoder", [write(0, 5)]))
    with pytest.raises(EngineClosed):
        running.load({"late": models["decoder"]})


class TestTurns:
    """Keys take turns where several wait."""

    def behind_a_burst(self, models: dict[str, Loaded], kind: str, items: Sequence[Item], single: Item) -> list[Work]:
        """The work of the steps after one during which a burst of one key came, and then a single item of another."""
        steps = Steps()
        with engine(models, [kind], steps) as running:
            steps.go.clear()
            tickets = running.submit(kind, [replace(single, request_id="first")], "burst")
            assert steps.held.wait(WAIT_S)
            seen = len(steps.works)
            tickets += running.submit(kind, items, "burst")
            tickets += running.submit(kind, [single], "single")
            steps.go.set()
            results(tickets)
            return steps.works[seen:]

    def test_a_single_text_to_read_is_in_the_next_step(self, models: dict[str, Loaded]) -> None:
        burst = [EncodeItem("burst", ids(number, 8)) for number in range(300)]
        after = self.behind_a_burst(models, "classify", burst, EncodeItem("single", ids(7, 8)))
        assert len(after) > 3
        assert "single" in after[0].request_ids

    def test_a_single_text_to_write_begins_with_the_first_of_the_burst(self, models: dict[str, Loaded]) -> None:
        burst = [write(number, 8) for number in range(300)]
        after = self.behind_a_burst(models, "decoder", burst, replace(write(7, 8), request_id="single"))
        prompts = [work.request_ids for work in after if work.phase is Phase.PREFILL]
        assert len(prompts) > 3 and "single" in prompts[0]

    def test_a_key_cannot_fill_the_queue_for_others(self, models: dict[str, Loaded]) -> None:
        steps = Steps()
        with engine(models, ["classify"], steps, max_waiting_items=100, key_share=0.5) as running:
            steps.go.clear()
            tickets = running.submit("classify", [EncodeItem("first", ids(0, 8))], "a")
            assert steps.held.wait(WAIT_S)
            item = EncodeItem("more", ids(1, 8))
            tickets += running.submit("classify", [item] * 50, "a")
            with pytest.raises(Overloaded):
                running.submit("classify", [item], "a")
            tickets += running.submit("classify", [item] * 50, "b")
            with pytest.raises(Overloaded):
                running.submit("classify", [item], "c")
            steps.go.set()
            results(tickets)
