"""Items in, tickets out: queues what is submitted, and runs one step at a time on each device.

An executor is a thread pinned to a group of cores, its device. Each has a worker for every model; waiting items are
common to all executors.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime as ort

from energy.types import Step
from models.manifest import ArtefactError, Manifest
from service.engine.backlog import Backlog
from service.engine.batching import fair_share
from service.engine.graphs import DecoderGraph, EncoderGraph, open_graph
from service.engine.texts import Written
from service.engine.types import (
    EncodeItem,
    EncodeOutput,
    EngineClosed,
    ExtractItem,
    Item,
    Output,
    Ticket,
    Timing,
    WriteItem,
    WriteOutput,
)
from service.engine.workers import EncodeWorker, Job, Result, Turn, Worker, WriteWorker

# How many waiting items are looked at for a batch of similar lengths.
_WINDOW = 512

_log = logging.getLogger(__name__)


class LoadedModel(Protocol):
    """A verified model folder."""

    @property
    def manifest(self) -> Manifest:
        """What the folder says of itself."""

    @property
    def folder(self) -> Path:
        """Where the graphs lie."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much the engine may use, and take on."""

    executors: int = 1
    threads: int = 1
    """Of each executor."""
    max_rows: int = 32
    """Texts, or beams of texts, that an executor writes at once with one model."""
    max_batch_tokens: int = 2048
    """Of one forward pass over new sequences, counted with padding."""
    max_waiting_items: int = 512
    max_waiting_tokens: int = 262_144


class ServiceSettings(Protocol):
    """The settings of the service that concern the engine."""

    @property
    def executors(self) -> int:
        """Executors that run side by side."""

    @property
    def threads(self) -> int:
        """Threads of each executor."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one forward pass."""

    @property
    def max_concurrent_requests(self) -> int:
        """Texts accepted at once."""


def engine_settings(settings: ServiceSettings) -> EngineSettings:
    """What the service's settings say to the engine."""
    return EngineSettings(
        executors=settings.executors,
        threads=settings.threads,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting_items=settings.max_concurrent_requests,
    )


class Engine:
    """Runs the models that it is given; every method but ``close`` may be called from any thread."""

    def __init__(
        self, models: Mapping[str, LoadedModel], recorder: Callable[[Step], None], settings: EngineSettings
    ) -> None:
        """Load the graphs and start the executors; returns when every model has run once.

        ``recorder`` is called on the executor's thread after each step, before the items that ended in it are
        answered. Raises ``ArtefactError`` for a model that the engine does not run.
        """
        self._recorder = recorder
        self._manifests = {name: model.manifest for name, model in models.items()}
        self._changed = threading.Condition()
        """Guards what follows; notified when there is work, and when there is none left."""
        self._waiting: dict[str, list[Job]] = {name: [] for name in models}
        self._backlog = Backlog(settings.max_waiting_items, settings.max_waiting_tokens)
        self._accepts = self._lives = True
        self._executors = [
            _Executor(f"cpu:{group}", workers, cores, settings.threads)
            for group, (workers, cores) in enumerate(_groups(models, settings))
        ]
        ready: list[Future[None]] = [Future() for _ in self._executors]
        self._threads = [
            threading.Thread(target=self._run, args=pair, name=pair[0].device, daemon=True)
            for pair in zip(self._executors, ready, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in ready:
                future.result()
        except BaseException:
            self.close()
            raise

    def submit(self, model: str, items: Sequence[Item]) -> list[Ticket]:
        """Queue all ``items`` for ``model``, or none.

        Raises ``Overloaded``, ``EngineClosed``, ``KeyError`` for an unknown model and ``ValueError`` for an item that
        the model cannot compute.
        """
        manifest = self._manifests[model]
        for item in items:
            _check(item, manifest, self._max_rows)
        now_ns = time.monotonic_ns()
        jobs = [Job(item, now_ns) for item in items]
        with self._changed:
            if not self._accepts:
                raise EngineClosed("the engine is draining and takes no more work")
            self._drop_cancelled(self._waiting[model])
            self._backlog.enter(len(jobs), sum(job.tokens for job in jobs))
            self._waiting[model] += jobs
            self._changed.notify_all()
        return [job.ticket for job in jobs]

    def queue_depth(self) -> int:
        """Items that wait for their first step."""
        with self._changed:
            return self._backlog.items

    def running(self) -> int:
        """Items that are being computed."""
        with self._changed:
            return sum(sum(executor.running.values()) for executor in self._executors)

    def drain(self, timeout_s: float) -> None:
        """Refuse new work from now on; returns when what was accepted is done, or after ``timeout_s``."""
        with self._changed:
            self._accepts = False
            self._changed.wait_for(self._is_idle, timeout_s)

    def close(self) -> None:
        """Stop after the steps that are running; what is unfinished fails with ``EngineClosed``. Call it once."""
        with self._changed:
            self._accepts = self._lives = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        unfinished = [job for waiting in self._waiting.values() for job in waiting]
        unfinished += [
            job for executor in self._executors for worker in executor.workers.values() for job in worker.jobs
        ]
        for job in unfinished:
            _answer(job, EngineClosed("the engine was closed before the item was done"))

    @property
    def _max_rows(self) -> int:
        return self._settings.max_rows

    def _is_idle(self) -> bool:
        return not self._backlog.items and not any(any(each.running.values()) for each in self._executors)

    def _run(self, executor: "_Executor", ready: "Future[None]") -> None:
        """The life of an executor's thread."""
        try:
            executor.pin()
            for model, worker in executor.workers.items():
                with executor.timed(model, (), 0) as step:
                    worker.warm_up()
        except BaseException as error:
            ready.set_exception(error)
            return
