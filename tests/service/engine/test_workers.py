"""Continuous batching without ONNX: a decoder whose rows are lists, and a text that depends on all that was read."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from energy.types import Phase
from models.manifest import Manifest, Quantisation, SpecialIds
from service.engine.graphs import DecoderGraph, EncoderGraph
from service.engine.texts import Written
from service.engine.types import ExtractItem, Sampling, WriteItem
from service.engine.workers import Job, Result, WriteWorker
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

    def __init__(self) -> None:
        self.rows: list[list[int]] = [[] for _ in range(ROWS)]
        self.fails = False

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self._maybe_fail()
        for number, prompt in enumerate(prompts):
            self.rows[first + number] = list(prompt)
        width = max(map(len, prompts))
        scores = [[float(token) for token in prompt] + [0.0] * (width - len(prompt)) for prompt in prompts]
        return np.stack([logits_after(prompt) for prompt in prompts]), np.array(scores, dtype=np.float32)

    def step(self, next_ids: Sequence[int]) -> NDArray[np.float32]:
        self._maybe_fail()
        for row, token in enumerate(next_ids):
            self.rows[row].append(token)
        return np.stack([logits_after(row) for row in self.rows[: len(next_ids)]])

    def know_source(self, row: int, length: int, cross: Mapping[str, NDArray[np.float32]]) -> None:
        self.rows[row] = cross["source"][:length].astype(int).tolist()

    def context(self, row: int) -> int:
        return len(self.rows[row])

    def fork(self, source: int, target: int) -> None:
        self.rows[target] = list(self.rows[source])

    move = fork

    def _maybe_fail(self) -> None:
        if self.fails:
            raise RuntimeError("out of memory")


class ListEncoder:
    """What reads sources for a ``ListDecoder``."""

    def run(self, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
        width = max(map(len, rows))
        return {"source": np.array([[*row, *[0] * (width - len(row))] for row in rows], dtype=np.float32)}


def worker_of(kind: Kind, decoder: ListDecoder, bos: int = 2) -> WriteWorker:
    manifest = Manifest(
        name="lists",
        revision="1",
        description="",
        tasks=("generate",),
        languages=("en",),
        config=tiny_config(kind, vocab_size=WORDS),
        max_input_tokens=40,
        special_ids=SpecialIds(pad=0, bos=bos, eos=EOS),
        quantisation=Quantisation(scheme="none"),
    )
    source = cast(EncoderGraph, ListEncoder()) if kind == "encoder-decoder" else None
    return WriteWorker(manifest, cast(DecoderGraph, decoder), source, ROWS, max_batch_tokens=60)


def job(prompt: Sequence[int], **how: Any) -> Job:
    return Job(WriteItem("r", tuple(prompt), Sampling(**{"max_tokens": 6, **how})), submitted_ns=0)


def step(worker: WriteWorker) -> list[tuple[Job, Result]]:
    turn = worker.turn()
    return [] if turn is None else turn.run()


Prompts = st.lists(st.integers(6, WORDS - 1), min_size=1, max_size=12)


@given(
    kind=st.sampled_from(["decoder", "encoder-decoder", "prefix-lm"]),
    arrivals=st.lists(st.lists(st.tuples(Prompts, st.integers(1, 8), st.booleans()), max_size=4), max_size=12),
    data=st.data(),
)
def test_any_schedule_writes_what_each_prompt_gives_alone(
    kind: Kind, arrivals: list[list[tuple[list[int], int, bool]]], data: st.DataObject
) -> None:
    worker = worker_of(kind, ListDecoder())
    waiting: list[Job] = []
    ended: dict[Job, Result] = {}
    jobs: list[Job] = []
    while arrivals or waiting or worker.jobs:
        for prompt, max_tokens, is_beam in arrivals.pop(0) if arrivals else []:
            jobs.append(job(prompt, max_tokens=max_tokens, beams=3 if is_beam else 1))
            waiting.append(jobs[-1])
        if waiting:
            taken = worker.take(waiting, most=data.draw(st.integers(1, 4)))
            waiting = [each for each in waiting if each not in taken]
        if worker.jobs and data.draw(st.integers(0, 9)) == 0:
            data.draw(st.sampled_from(worker.jobs)).ticket.future.cancel()
        ended.update(step(worker))
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
    worker = worker_of("decoder", ListDecoder())
    first, wide, narrow = job([7] * 3), job([8] * 3, beams=6), job([9] * 3)
    assert worker.take([first], most=9) == [first]
    step(worker)
    assert worker.take([wide, narrow], most=9) == []
    while worker.busy:
        step(worker)
    assert worker.take([wide, narrow], most=9) == [wide]


def test_a_failed_prompt_leaves_those_who_write_alone() -> None:
    decoder = ListDecoder()
    worker = worker_of("decoder", decoder)
    early, late = job([7, 8], max_tokens=6), job([9, 10])
    worker.take([early], most=9)
    step(worker)
    worker.take([late], most=9)
    turn = worker.turn()
    assert turn is not None and turn.jobs == (late,)
    decoder.fails = True
    with pytest.raises(RuntimeError):
        turn.run()
    turn.abandon()
    decoder.fails = False
    assert worker.jobs == [early]
    ended: dict[Job, Result] = {}
    while worker.busy:
        ended.update(step(worker))
    assert ended == {early: alone([7, 8], 6)}


def test_a_failed_step_frees_all_rows() -> None:
    decoder = ListDecoder()
    worker = worker_of("decoder", decoder)
    worker.take([job([7, 8]), job([7, 9], beams=2)], most=9)
    step(worker)
    turn = worker.turn()
    assert turn is not None
    decoder.fails = True
    with pytest.raises(RuntimeError):
        turn.run()
    turn.abandon()
    assert not worker.busy and worker.jobs == []


def test_documents_are_scored_and_gone_in_one_step() -> None:
    worker = worker_of("prefix-lm", ListDecoder())
    document = Job(ExtractItem("x", (7, 8, 9)), submitted_ns=0)
    text = job([7, 8])
    worker.take([document, text], most=9)
    turn = worker.turn()
    assert turn is not None
    assert [(work.phase, work.tokens) for work in turn.work] == [(Phase.PREFILL, 3), (Phase.PREFILL, 2)]
    [(ended, scores)] = turn.run()
    assert ended is document
    np.testing.assert_array_equal(cast(Any, scores), [7, 8, 9])
    assert worker.jobs == [text]
