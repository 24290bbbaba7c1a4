"""A device and the worker that it has for each model: runs steps, one at a time, and times them."""

import logging
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from energy.attribution import DEFAULTS, UNCALIBRATED, Coefficients, Weights, share_load
from energy.types import UNSHARED, Shares, Step, Work, load_of
from service.engine.types import Answer
from service.engine.workers import Job, Result, Turn, Worker

_NICER = 5
"""How much nicer an executor is than the rest of the service. Where both want a core, the event loop gets three
quarters of it: while it waits for one it may hold the interpreter, and so hold up every executor."""
_LONG_NS = 20_000_000
"""A step that has lasted so long begins no further pass: bills follow at less than the meters' pace otherwise."""
_SHARED_NS = 5_000_000
"""Nor one that has lasted so long where other models have something to run. So models take turns by time: by passes,
one whose passes are short would wait most of the time."""
_log = logging.getLogger(__name__)


class Errand:
    """Something for a device's thread to do besides steps, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._work = work

    def run(self) -> None:
        """Do it."""
        try:
            self.future.set_result(self._work())
        except BaseException as error:
            self.future.set_exception(error)


class Executor:
    """Everything but ``running`` and ``errands`` is used by one thread, the device's own."""

    def __init__(
        self,
        device: str,
        cores: Sequence[int],
        threads: int,
        coefficients: Mapping[str, Coefficients] | None = UNCALIBRATED,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """By ``coefficients`` jobs share steps; None where nobody wants to know. ``check``, which a failed step is
        followed by, raises where the device is lost."""
        self.device, self._check = device, check
        self.workers: dict[str, Worker] = {}
        """By the key under which a model is loaded."""
        self.running: dict[str, Sequence[Job]] = {}
        """Jobs that each model's worker has; guarded by the engine's lock."""
        self.errands: deque[Errand] = deque()
        """What the device's thread is to do between two steps; guarded by the engine's lock."""
        self._names: dict[str, str] = {}
        """What the models are called."""
        self._cores, self._threads, self._coefficients = cores, threads, coefficients
        self.order: list[str] = []
        """The models, the one that has waited longest for a step first."""

    def pin(self) -> None:
        """Bind the calling thread to the device's cores, and let the event loop go before it, where the system can."""
        if sys.platform != "linux":
            return
        os.sched_setaffinity(0, self._cores)
        # With more threads, the others are ONNX Runtime's, and would wait for the one that others go before.
        if self._threads == 1:
            os.nice(_NICER)

    def served(self, model: str) -> None:
        """Put ``model``, which gets the next step, last in the order."""
        self.order.remove(model)
        self.order.append(model)

    def adopt(self, model: str, worker: Worker, name: str) -> Step:
        """Run every graph of ``worker`` once, and from now on the steps that it has for ``model``."""
        timer = _Timer(self._threads)
        worker.warm_up()
        self.workers[model], self._names[model] = worker, name
        self.order.append(model)
        return timer.step(self.device, name, None, None)

    def drop(self, model: str) -> Sequence[Job]:
        """Forget ``model``, if it is here; returns the jobs that it had not finished."""
        worker = self.workers.pop(model, None)
        if worker is None:
            return ()
        self.order.remove(model)
        del self._names[model]
        return worker.jobs

    def run(self, model: str, turn: Turn, is_wanted: Callable[[], bool]) -> tuple[Step, Sequence[tuple[Job, Result]]]:
        """Run one step; where it raises, all of its jobs end with the error. That the device is lost is raised.

        It goes on with further passes for a while, unless something else ``is_wanted`` of this executor: what there is
        to do between two steps costs the more, the fewer texts they are for.
        """
        name = self._names[model]
        known = self._coefficients
        weights = None if known is None else known.get(name, DEFAULTS).of(turn.work.phase)
        timer, passes, cancellations = _Timer(self._threads), 1, Answer.cancellations
        is_shared = any([worker.busy for key, worker in self.workers.items() if key != model])
        most_ns = _SHARED_NS if is_shared else _LONG_NS
        try:
            ended = turn.run()
            while turn.repeats and not (
                ended or timer.elapsed_ns > most_ns or is_wanted() or Answer.cancellations != cancellations
            ):
                passes += 1
                ended = turn.run()
        except Exception as error:
            _log.exception("a step of %s failed", name)
            self._check()
            turn.abandon()
            ended = [(job, error) for job in turn.jobs]
        step = timer.step(self.device, name, turn.work, weights, turn.padding_tokens, passes)
        duration_ns = step.ended_ns - step.started_ns
        for job in turn.jobs:
            if job.started_ns is None:
                job.started_ns = step.started_ns
            job.compute_ns += duration_ns
        _tell(turn.jobs, step.shares)
        return step, ended


def _tell(jobs: Sequence[Job], shares: Shares) -> None:
    """Tell jobs what falls to each of the load of their step, for a first bill."""
    even_ns, token_ns, tokens = shares
    for job, own in zip(jobs, tokens, strict=False):
        job.load_ns += even_ns + token_ns * own


class _Timer:
    """Times a step from its making on."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # A graph of one thread runs on the caller's. Of more, the process's time is the nearest there is: it holds
        # what other parts of the service did meanwhile.
        self._cpu_clock = time.thread_time_ns if threads == 1 else time.process_time_ns
        self._cpu_ns = self._cpu_clock()
        self._started_ns = time.monotonic_ns()

    @property
    def elapsed_ns(self) -> int:
        """How long the step has lasted."""
        return time.monotonic_ns() - self._started_ns

    def step(
        self,
        device: str,
        model: str,
        work: Work | None,
        weights: Weights | None,
        padding_tokens: int = 0,
        passes: int = 1,
    ) -> Step:
        """What has run since then."""
        ended_ns = time.monotonic_ns()
        # The system takes the core from who has computed for long, and does so at the end of a call to it, such as the
        # clock below: by then the interpreter must be free, or all others wait as well. Waiting for nothing lets go of
        # it; so does sleeping for no time, but that takes 60 microseconds.
        select.select((), (), (), 0)
        duration_ns = ended_ns - self._started_ns
        cpu_ns = min(self._cpu_clock() - self._cpu_ns, self._threads * duration_ns)
        load_ns = load_of(device, duration_ns, cpu_ns)
        shares = UNSHARED if work is None or weights is None else share_load(load_ns, work, passes, weights)
        return Step(device, model, self._started_ns, ended_ns, cpu_ns, load_ns, work, shares, padding_tokens, passes)
