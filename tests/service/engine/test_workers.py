"""Continuous batching without ONNX: a decoder whose rows are lists, and a text that depends on all that was read."""

import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from energy.attribution import Coefficients
from energy.types import Phase, Work
from models.manifest import Manifest, Quantisation, SpecialIds
from service.engine.graphs import WriteGraphs
from service.engine.texts import Written
from service.engine.types import ExtractItem, Sampling, WriteItem
from service.engine.workers import Job, Limits, Result, WriteWorker
from tests.energy.fakes import step_of, weigh
from tests.tiny import EOS, Kind, tiny_config

WORDS = 20
ROWS = 6


def logits_after(read: Sequence[int]) -> NDArray[np.float32]:
    """Of the next word, after all that a row has read."""
    random = np.random.default_rng(zlib.crc32(bytes(read)))
    return random.standard_normal(WORDS).astype(np.float32)


def alone(prompt: Sequence[int], max_tokens: int) -> Written:
    read, text = list(prompt), list[int]()
    while len(text) < max_tokens:
        word = int(logits_after(read).argmax())
        if word == EOS:
            return Written(tuple(text), "stop")
        read.append(word)
        text.append(word)
    return Written(tuple(text), "length")


class ListDecoder:
    """What ``DecoderGraph`` does, on lists; every row's own history is all that it sees."""

    def __init__(self, graphs: "ListGraphs", n_texts: int, beams: int) -> None:
        self.graphs, self.beams = graphs, beams
        self.rows: list[list[int]] = [[] for _ in range(n_texts * beams)]

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.array([len(row) for row in self.rows])

    def prefill(self, used: int, prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.graphs.maybe_fail()
        for number, prompt in enumerate(prompts):
            self.rows[used + number * self.beams] = list(prompt)
            self._align(used // self.beams + number)
        width = max(map(len, prompts))
        scores = [[float(token) for token in prompt] + [0.0] * (width - len(prompt)) for prompt in prompts]
        return np.stack([logits_after(prompt) for prompt in prompts]), np.array(scores, dtype=np.float32)

    def forget(self) -> None:
        self.rows[0] = []

    def read_on(self, piece: Sequence[int]) -> NDArray[np.float32]:
        self.graphs.maybe_fail()
        self.rows[0] = [*self.rows[0], *piece]
        return logits_after(self.rows[0])[None]

    def step(self, next_ids: Sequence[int]) -> NDArray[np.float32]:
        self.graphs.maybe_fail()
        for row, token in enumerate(next_ids):
            self.rows[row] = [*self.rows[row], int(token)]
        return np.stack([logits_after(row) for row in self.rows[: len(next_ids)]])

    def read_sources(self, first: int, sources: Sequence[Sequence[int]]) -> None:
        self.graphs.maybe_fail()
        for text, source in enumerate(sources, first):
            self.rows[text * self.beams : (text + 1) * self.beams] = [list(source) for _ in range(self.beams)]

    def padding_rows(self, used: int) -> int:
        return 0

    def contexts(self, n_texts: int) -> list[int]:
        return [self.beams * len(self.rows[text * self.beams]) for text in range(n_texts)]

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        for source, target, start in copies:
            self.rows[target] = self.rows[target][:start] + self.rows[source][start:]

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        for source, target in moves:
            for beam in range(self.beams):
                self.rows[target * self.beams + beam] = list(self.rows[source * self.beams + beam])

    def adopt(self, text: int, reader: "ListDecoder") -> None:
        self.recall(text, reader.remember(0))

    def remember(self, text: int) -> list[NDArray[np.float32]]:
        return [np.array(self.rows[text * self.beams], dtype=np.float32).reshape(1, -1, 1)]

    def recall(self, text: int, memory: Sequence[NDArray[np.float32]]) -> None:
        self.rows[text * self.beams] = memory[0].reshape(-1).astype(int).tolist()
        self._align(text)

    def _align(self, text: int) -> None:
        """The other rows stand where the first one does, but hold something else until it is copied."""
        row = text * self.beams
        self.rows[row + 1 : row + self.beams] = [[99] * len(self.rows[row])] * (self.beams - 1)


class ListGraphs:
    """What ``WriteGraphs`` gives a worker."""

    on_device = False

    def __init__(self, reads_sources: bool) -> None:
        self.fails = False
        self.beams = self
        self.source = self if reads_sources else None
        self.reader = ListDecoder(self, 1, 1)

    def maybe_fail(self) -> None:
        if self.fails:
            raise RuntimeError("out of memory")

    def decoder(self, n_texts: int, beams: int, *, records: bool = False) -> ListDecoder:
        return ListDecoder(self, n_texts, beams)

    def run(self, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
        self.maybe_fail()
        width = max(map(len, rows))
        return {"source": np.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=np.float32)}

    def likeliest(self, logits: NDArray[np.float32], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        words = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(normalised, words, 1), words


def worker_of(
    kind: Kind, graphs: ListGraphs | None = None, piece_tokens: int = 8, prefix_bytes: int = 0, rows: int = ROWS
) -> WriteWorker:
    manifest = Manifest(
        name="lists",
        revision="1",
        description="",
        tasks=("generate",),
        languages=("en",),
        config=tiny_config(kind, vocab_size=WORDS),
        max_input_tokens=40,
        special_ids=SpecialIds(pad=0, bos=2, eos=EOS),
        quantisation=Quantisation(scheme="none"),
    )
    graphs = graphs or ListGraphs(kind == "encoder-decoder")
    limits = Limits(rows=rows, batch_tokens=60, piece_tokens=piece_tokens, prefix_bytes=prefix_bytes)
    return WriteWorker(manifest, cast(WriteGraphs, graphs), limits)


def job(prompt: Sequence[int], **how: Any) -> Job:
    return Job(WriteItem("r", tuple(prompt), Sampling(**{"max_tokens": 6, **how})), submitted_ns=0)


def step(worker: WriteWorker) -> list[tuple[Job, Result]]:
    turn = worker.turn()
    return [] if turn is None else turn.run()


Prompts = st.lists(st.integers(6, WORDS - 1), min_size=1, max_size=12)


@given(
    kind=st.sampled_from(["decoder", "encoder-decoder", "prefix-lm"]),
    arrivals=st.lists(
        st.lists(st.tuples(Prompts, st.integers(1, 8), st.sampled_from([1, 1, 2, 3])), max_size=4), max_size=12
    ),
    on_device=st.booleans(),
    data=st.data(),
)
def test_any_schedule_writes_what_each_prompt_gives_alone(
    kind: Kind, arrivals: list[list[tuple[list[int], int, int]]], on_device: bool, data: st.DataObject
) -> None:
    graphs = ListGraphs(kind == "encoder-decoder")
    graphs.on_device = on_device
    worker = worker_of(kind, graphs)
    waiting: list[Job] = []
    ended: dict[Job, Result] = {}
    jobs: list[Job] = []
    while arrivals or waiting or worker.jobs:
        for prompt, max_tokens, beams in arrivals.pop(0) if arrivals else []:
            jobs.append(job(prompt, max_tokens=max_tokens, beams=beams))
            waiting.append(jobs[-1])
        if waiting:
            taken = worker.take(waiting, share=data.draw(st.integers(1, 4)))
            waiting = [each for each in waiting if each not in taken]
        if worker.jobs and data.draw(st.integers(0, 9)) == 0:
            data.draw(st.sampled_from(worker.jobs)).ticket.future.cancel()
        ended.update(step(worker))
        # A device has memory for one number of beams beside the usual ones.
        assert not on_device or len({*worker._lanes} - {1}) <= 1
    assert not worker.busy
    for each in jobs:
        if each.cancelled:
            assert each not in ended
        elif each.rows == 1:
            assert isinstance(each.item, WriteItem)
            start = [*each.item.input_ids, *([2] if kind == "encoder-decoder" else [])]
            assert ended[each] == alone(start, each.item.sampling.max_tokens)
        else:
            assert isinstance(ended[each], Written)


def test_a_job_that_needs_many_rows_is_not_overtaken() -> None:
    worker = worker_of("decoder")
    first, wide, narrow = job([7] * 3), job([8] * 3, beams=6), job([9] * 3)
    assert worker.take([first], share=9) == [first]
    step(worker)
    assert worker.take([wide, narrow], share=9) == []
    while worker.busy:
        step(worker)
    assert worker.take([wide, narrow], share=9) == [wide]


def test_a_failed_prompt_leaves_those_who_write_alone() -> None:
    graphs = ListGraphs(reads_sources=False)
    worker = worker_of("decoder", graphs)
    early, late = job([7, 8], max_tokens=6), job([9, 10])
    worker.take([early], share=9)
    step(worker)
    worker.take([late], share=9)
    turn = worker.turn()
    assert turn is not None and turn.jobs == (late,)
    graphs.fails = True
    with pytest.raises(RuntimeError):
        turn.run()
    turn.abandon()
    graphs.fails = False
    assert worker.jobs == [early]
    ended: dict[Job, Result] = {}
    while worker.busy:
        ended.update(step(worker))
    assert ended == {early: alone([7, 8], 6)}


def test_a_failed_step_frees_its_rows() -> None:
    graphs = ListGraphs(reads_sources=False)
    worker = worker_of("decoder", graphs)
    for each in (job([7, 8]), job([7, 9], beams=2)):
        worker.take([each], share=9)
        step(worker)
    turn = worker.turn()
    assert turn is not None
    graphs.fails = True
    with pytest.raises(RuntimeError):
        turn.run()
    turn.abandon()
    assert len(worker.jobs) == 1


def test_a_long_prompt_takes_turns_with_those_who_write() -> None:
    graphs = ListGraphs(reads_sources=False)
    worker = worker_of("decoder", graphs, piece_tokens=4)
    early, long = job([7, 8], max_tokens=6), job(list(range(6, 17)), max_tokens=3, beams=2)
    worker.take([early], share=9)
    step(worker)
    assert worker.take([long], share=9) == [long]
    # Nobody else's long prompt meanwhile, and no rows beyond those that it will need.
    assert worker.take([job([6] * 9)], share=9) == []
    assert worker.take([job([7], beams=4)], share=9) == []
    works: list[Work] = []
    while long in worker.jobs and not any(work.phase is Phase.DECODE and work.tokens == [2] for work in works[-1:]):
        turn = worker.turn()
        assert turn is not None
        turn.run()
        works += [turn.work] * (turn.work.phase is Phase.PREFILL or turn.jobs == (long,))
    assert [(*work.tokens, *work.context_tokens) for work in works[:3]] == [(4, 0), (4, 4), (3, 8)]


def test_a_long_prompt_that_fails_or_is_cancelled_is_forgotten() -> None:
    graphs = ListGraphs(reads_sources=False)
    worker = worker_of("decoder", graphs)
    for fails in (True, False):
        long = job([7] * 20)
        worker.take([long], share=9)
        step(worker)
        turn = worker.turn()
        assert turn is not None
        if fails:
            graphs.fails = True
            with pytest.raises(RuntimeError):
                turn.run()
            turn.abandon()
            graphs.fails = False
        else:
            long.ticket.future.cancel()
            assert worker.turn() is None
        assert not worker.busy and worker.jobs == []


def test_lanes_take_turns() -> None:
    worker = worker_of("decoder")
    plain, wide = job([7, 8], max_tokens=6), job([7, 9], max_tokens=6, beams=2)
    for each in (plain, wide):
        assert worker.take([each], share=9) == [each]
        step(worker)
    order = []
    while len(order) < 4:
        turn = worker.turn()
        assert turn is not None
        turn.run()
        order.append(turn.jobs)
    assert order == [(plain,), (wide,)] * 2 or order == [(wide,), (plain,)] * 2


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_several_passes_do_the_work_of_as_many_steps(kind: Kind, beams: int) -> None:
    start = [2] if kind == "encoder-decoder" else []
    prompts = [[word, 8, 7][: 2 + word % 2] for word in range(6, WORDS)]
    long = [prompt for prompt in prompts if len(alone([*prompt, *start], 9).ids) == 9][:2]
    assert len(long) == 2

    def writing() -> WriteWorker:
        worker = worker_of(kind)
        worker.take([job(prompt, beams=beams, max_tokens=9) for prompt in long], share=9)
        assert not step(worker)
        return worker

    together, apart = writing(), writing()
    turn = together.turn()
    assert turn is not None and turn.repeats
    outcomes = [turn.run() for _ in range(3)]
    coefficients = Coefficients(1000, decode_token=10, context_token=1)
    weights = np.zeros(2)
    tokens = context_tokens = 0
    for outcome in outcomes:
        single = apart.turn()
        assert single is not None and single.run() == outcome == []
        one = step_of(single.work)
        tokens, context_tokens = tokens + one.tokens, context_tokens + one.context_tokens
        weights += weigh(single.work, coefficients)
    three = step_of(turn.work, passes=3)
    assert [3 * weight for weight in weigh(turn.work, coefficients, passes=3)] == weights.tolist()
    assert (three.tokens, three.context_tokens) == (tokens, context_tokens)


def test_a_step_of_several_passes_is_for_texts_that_nothing_else_waits_for() -> None:
    def repeats(*others: Job, watched: bool = False) -> bool:
        worker = worker_of("decoder", piece_tokens=4)
        text = job([7, 8], max_tokens=9)
        if watched:
            text.item = replace(text.item, should_stop=lambda ids: False)
        for each in (text, *others):
            worker.take([each], share=9)
            step(worker)
        turns = [worker.turn() for _ in range(2)]
        return any(turn is not None and turn.repeats for turn in turns)

    assert repeats()
    assert repeats(job([9, 10, 11]))
    assert not repeats(job([9, 10], beams=2))
    assert not repeats(job([7] * 20))
    assert not repeats(watched=True)


def test_sources_are_read_together_while_others_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def holds_off(kind: Kind, n_written: int, share: int, waited_ms: float = 19) -> bool:
        worker = worker_of(kind, rows=12)
        while len(worker.jobs) < n_written:
            worker.take([job([7, 7 + len(worker.jobs)], max_tokens=9)], share=1)
            turn = worker.turn()
            assert turn is not None and turn.work.phase is not Phase.DECODE
            turn.run()
        monkeypatch.setattr(time, "monotonic_ns", lambda: round(waited_ms * 1_000_000))
        return worker.holds_off([job([9])] * share, share)

    # One for four that are written.
    assert [holds_off("encoder-decoder", written, 1) for written in (0, 1, 7, 8)] == [False, False, False, True]
    assert [holds_off("encoder-decoder", 8, share) for share in (2, 3)] == [False, False]
    assert [holds_off("encoder-decoder", 12, share) for share in (2, 3)] == [True, False]
    assert not holds_off("encoder-decoder", 8, 1, waited_ms=21)
    # Prompts are long enough to be worth a step.
    assert not holds_off("decoder", 8, 1)
    assert not holds_off("prefix-lm", 8, 1)


def test_documents_are_scored_and_gone_in_one_step() -> None:
    worker = worker_of("prefix-lm")
    document = Job(ExtractItem("x", (7, 8, 9)), submitted_ns=0)
    text = job([7, 8])
    worker.take([document, text], share=9)
    turn = worker.turn()
    assert turn is not None
    assert turn.work == Work(Phase.PREFILL, ["x", text.item.request_id], [3, 2])
    [(ended, scores)] = turn.run()
    assert ended is document
    np.testing.assert_array_equal(cast(Any, scores), [7, 8, 9])
    assert worker.jobs == [text]
