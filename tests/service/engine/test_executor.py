"""An executor's thread has cores of its own and lets the rest of the service go first; a step is as many passes as
nobody minds."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from energy.types import Phase, Work
from service.engine import executor as module
from service.engine.executor import Executor
from service.engine.types import EncodeItem
from service.engine.workers import Job, Result, Turn, Worker

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own elsewhere")


def pinned(threads: int) -> tuple[int, set[int]]:
    """How much nicer than the others the thread of an executor is, and its cores."""
    core = min(os.sched_getaffinity(0))

    def pin() -> tuple[int, set[int]]:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        Executor("cpu:0", [core], threads).pin()
        return os.getpriority(os.PRIO_PROCESS, 0) - before, os.sched_getaffinity(0) - {core}

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(pin).result()


@on_linux
def test_an_executor_of_one_thread_lets_others_go_first() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    nicer, other_cores = pinned(1)
    assert not other_cores
    assert nicer == min(5, 19 - before[0])
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before


@on_linux
def test_one_of_several_threads_stays_as_its_fellows_are() -> None:
    assert pinned(2) == (0, set())


class Steps:
    """An executor with a model that writes one text, and another model; its passes are counted, and take 1 ms each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, other_is_busy: bool = False) -> None:
        def clock() -> int:
            return self.passes * 1_000_000

        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=clock, thread_time_ns=clock))
        self.passes = 0
        self.executor = Executor("cpu:0", [0], 1)
        self.job = Job(EncodeItem("r", (1,)), submitted_ns=0)
        self.abandoned = False
        for key, busy in (("writer", True), ("other", other_is_busy)):
            worker = SimpleNamespace(warm_up=lambda: None, busy=busy)
            self.executor.adopt(key, cast(Worker, worker), key)

    def run(
        self, at_pass: Callable[[int], Sequence[Any]], *, repeats: bool = True, wanted_after: int = 99
    ) -> tuple[int, Sequence[tuple[Job, Result]]]:
        """The passes of the step that was recorded, and what ended in it."""

        def once() -> Sequence[Any]:
            self.passes += 1
            return at_pass(self.passes)

        def abandon() -> None:
            self.abandoned = True

        turn = Turn((self.job,), Work(Phase.DECODE, ["r"], [1], [10]), 0, once, abandon, repeats)
        step, ended = self.executor.run("writer", turn, lambda: self.passes >= wanted_after)
        assert step.work is turn.work
        assert self.job.compute_ns == step.ended_ns - step.started_ns > 0
        assert step.passes == self.passes
        return step.passes, ended


def test_a_step_goes_on_until_a_text_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    over = [(steps.job, ValueError())]
    assert steps.run(lambda number: over if number == 3 else []) == (3, over)


def test_a_step_ends_where_something_else_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Steps(monkeypatch).run(lambda number: [], wanted_after=2) == (2, [])
    assert Steps(monkeypatch).run(lambda number: [], repeats=False) == (1, [])


def test_a_step_ends_where_a_text_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    assert steps.run(lambda number: steps.job.ticket.future.cancel() and [] if number == 4 else []) == (4, [])


def test_a_step_ends_once_it_has_lasted_long_and_sooner_where_another_model_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Steps(monkeypatch).run(lambda number: []) == (21, [])
    assert Steps(monkeypatch, other_is_busy=True).run(lambda number: []) == (6, [])


def test_a_later_pass_that_fails_is_counted_and_ends_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, error = Steps(monkeypatch), RuntimeError("out of memory")

    def at_pass(number: int) -> Sequence[Any]:
        if number == 2:
            raise error
        return []

    assert steps.run(at_pass) == (2, [(steps.job, error)])
    assert steps.abandoned
