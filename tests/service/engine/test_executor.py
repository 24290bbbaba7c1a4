"""An executor's thread has cores of its own, and lets the rest of the service go first."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.engine.executor import Executor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own elsewhere")


def pinned(threads: int) -> tuple[int, set[int]]:
    """How much nicer than the others the thread of an executor is, and its cores."""
    core = min(os.sched_getaffinity(0))

    def pin() -> tuple[int, set[int]]:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        Executor("cpu:0", [core], threads).pin()
        return os.getpriority(os.PRIO_PROCESS, 0) - before, os.sched_getaffinity(0) - {core}

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(pin).result()


def test_an_executor_of_one_thread_lets_others_go_first() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    nicer, other_cores = pinned(1)
    assert not other_cores
    assert nicer == min(5, 19 - before[0])
    assert (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)) == before


def test_one_of_several_threads_stays_as_its_fellows_are() -> None:
    assert pinned(2) == (0, set())
