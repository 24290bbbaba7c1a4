"""What a peer's process does: JSON lines in, JSON lines out. Knows nothing of other peers.

Standard library only, in every peer's environment. The parent sends ``{"load": {...}}`` once (the fields of ``Load``),
then ``{"run": {...}}`` any number of times (the fields of ``Run``); each is answered by one line. Whatever the peer's
libraries print goes to the standard error.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Protocol

Ids = list[list[int]]
_PR_SET_PDEATHSIG = 1
"""Of ``linux/prctl.h``."""


@dataclass(frozen=True, slots=True)
class Load:
    """Which model to load, and how to run it."""

    folder: str
    kind: str
    """``encode``, ``translate`` or ``generate``."""
    variant: str
    """The numbers it computes with: ``fp32``, ``int8``, ..."""
    threads: int
    """Of each replica."""
    replicas: int
    """How many batches it computes side by side, where the engine can; else the parent starts more processes."""
    batch_tokens: int
    """Encoders: how many tokens, padding included, one forward pass takes."""
    cores: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A batch to compute, ``repeats`` times over."""

    rows: Ids
    beams: int = 1
    new_tokens: int = 0
    repeats: int = 1
    with_outputs: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """What computing took."""

    started_s: float
    """The system's monotonic clock, the same in all processes."""
    ended_s: float
    cpu_s: float
    """Of all threads of the process."""
    outputs: list[list[float]] | Ids | None
    """Per row the ids written, or the pooled vector."""


class Runner(Protocol):
    """A loaded model."""

    def __call__(self, run: Run) -> list[list[float]] | Ids:
        """Compute the batch once: per row ``run.new_tokens`` ids, or the mean of the last layer over the tokens."""


def serve(packages: Sequence[str], load: Callable[[Load], Runner]) -> None:
    """Answer the parent until it closes the input. ``packages`` are those whose versions matter."""
    # A stopped process never reads that its input has ended, so it goes down with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Answers get a stream of their own: libraries print to the standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(message: dict[str, object]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    runner: Runner | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "load" in message:
                order = Load(**message["load"])
                # Before the libraries start threads: those inherit it.
                os.sched_setaffinity(0, order.cores)
                runner = load(order)
                answer({"versions": {package: version(package) for package in packages}})
            elif runner is not None:
                answer(asdict(timed(runner, Run(**message["run"]))))
        except Exception as error:  # the parent decides what a failure means
            answer({"error": f"{type(error).__name__}: {error}"})


def timed(runner: Runner, run: Run) -> Ran:
    """Compute the batch as often as it says."""
    cpu_s, started_s = time.process_time(), time.monotonic()
    for _ in range(run.repeats):
        outputs = runner(run)
    ended_s, ended_cpu_s = time.monotonic(), time.process_time()
    return Ran(started_s, ended_s, ended_cpu_s - cpu_s, outputs if run.with_outputs else None)


def batches(rows: Sequence[Sequence[int]], batch_tokens: int, replicas: int = 1) -> list[list[int]]:
    """Places of ``rows`` in batches of similar lengths, each of ``batch_tokens`` or fewer, padding included.

    A row over that goes alone. Batches are smaller where that gives each of ``replicas`` a share of the rows.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)
    share = -(-sum(len(row) for row in rows) // replicas)
    budget = min(batch_tokens, max(share, len(rows[order[0]])))
    found: list[list[int]] = []
    for place in order:
        if found and (len(found[-1]) + 1) * len(rows[found[-1][0]]) <= budget:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Ids, Ids]:
    """Rows padded on the right to one width, and their masks."""
    width = max(len(row) for row in rows)
    return (
        [[*row, *[value] * (width - len(row))] for row in rows],
        [[1] * len(row) + [0] * (width - len(row)) for row in rows],
    )
