"""Items in, tickets out: queues what is submitted, and keeps one step at a time running on each device."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, Protocol

from energy.attribution import UNCALIBRATED, Coefficients
from energy.types import BESIDE, UNSHARED, Load, Phase, Step
from models.manifest import Manifest
from service.engine.backlog import Backlog
from service.engine.batching import fair_share
from service.engine.executor import Errand, Executor
from service.engine.fairness import Turns
from service.engine.loading import LoadedModel, memory_of, open_executors, open_workers, rows_that_fit
from service.engine.pages import enlarge_pages
from service.engine.reuse import Reuse
from service.engine.settings import EngineSettings
from service.engine.texts import Written
from service.engine.types import (
    EncodeItem,
    EncodeOutput,
    EngineClosed,
    EngineFailed,
    ExtractItem,
    Item,
    Output,
    Ticket,
    Timing,
    WriteItem,
    WriteOutput,
)
from service.engine.workers import Job, Result, Worker

# How many waiting items are looked at for a batch of similar lengths; of several keys' fewer, for within the window
# length decides and not whose turn it is.
_WINDOW = 512
_SHARED_WINDOW = 32
_NS_PER_S = 1e9

Recorder = Callable[[Step], None]
"""Keeps account of a step."""

_log = logging.getLogger(__name__)


class ServiceSettings(Protocol):
    """The settings of the service that concern the engine."""

    @property
    def executors(self) -> int:
        """How many run side by side."""

    @property
    def threads(self) -> int:
        """Threads of each executor."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Where models run."""

    @property
    def gpus(self) -> tuple[int, ...]:
        """Which GPUs."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens of one forward pass."""

    @property
    def max_concurrent_requests(self) -> int:
        """Texts accepted at once."""

    @property
    def max_model_mb(self) -> int:
        """Memory of one model."""

    @property
    def max_queue_tokens(self) -> int:
        """Tokens that may wait."""

    @property
    def max_key_share(self) -> float:
        """Of what may wait, how much may be one key's."""

    @property
    def reuse_mb(self) -> int:
        """Memory of outputs that are kept for requests that come again."""


def engine_settings(settings: ServiceSettings) -> EngineSettings:
    """What the service's settings say to the engine."""
    return EngineSettings(
        executors=settings.executors,
        threads=settings.threads,
        device=settings.device,
        gpus=settings.gpus,
        max_batch_tokens=settings.max_batch_tokens,
        max_waiting_items=settings.max_concurrent_requests,
        max_waiting_tokens=settings.max_queue_tokens,
        key_share=settings.max_key_share,
        max_model_bytes=settings.max_model_mb * 1_000_000,
        reuse_bytes=settings.reuse_mb * 1_000_000,
    )


class Engine:
    """Runs the models that it is given; its methods may be called from any thread."""

    def __init__(
        self,
        models: Mapping[str, LoadedModel],
        recorder: Recorder,
        settings: EngineSettings,
        coefficients: Mapping[str, Coefficients] | None = UNCALIBRATED,
    ) -> None:
        """Load the graphs and start the executors; returns when every model has run once.

        ``recorder`` is called on the executor's thread after each step, before the items that ended in it are
        answered. ``coefficients``, by which items share a step, are by model, and may come to hold more of them; None
        where nobody wants to know what falls to whom.
        Raises ``ArtefactError`` for a model that the engine does not run.
        """
        self._recorder, self._settings = recorder, settings
        self._reuse = Reuse(settings.reuse_bytes)
        self._executors = open_executors(settings, coefficients)
        self._changed = threading.Condition()
        """Guards what follows; notified when work comes, when none is left, and at the end."""
        self._manifests: dict[str, Manifest] = {}
        self._rows: dict[str, int] = {}
        self._waiting: dict[str, list[Job]] = {}
        self._backlog = Backlog(settings.max_waiting_items, settings.max_waiting_tokens, settings.key_share)
        self._turns = Turns()
        self._accepts = self._lives = True
        self.lost: EngineFailed | None = None
        """Why nothing is computed any more, where the engine has stopped of itself."""
        self._closing = threading.Lock()
        self._threads = [
            threading.Thread(target=self._live, args=(executor,), name=executor.device, daemon=True)
            for executor in self._executors
        ]
        for thread in self._threads:
            thread.start()
        try:
            self.load(models)
        except BaseException:
            self.close()
            raise

    def memory_of(self, model: LoadedModel) -> int:
        """Most bytes that ``model`` takes once it is loaded. Raises ``ArtefactError`` where it may take no such."""
        return memory_of(model, self._settings)

    def load(self, models: Mapping[str, LoadedModel]) -> None:
        """Load more ``models`` while others run, under new keys; returns when each has run once on every executor.

        What that takes is recorded as steps without work. Raises ``ArtefactError`` for a model that the engine does
        not run, and ``EngineClosed``; then none of them is loaded.
        """
        started_ns = time.monotonic_ns()
        opened = open_workers(models, self._settings)
        cpu_ns = opened.cpu_ns // max(1, len(models))
        for model in models.values():
            name, ended_ns = model.manifest.name, time.monotonic_ns()
            self._record(Step(BESIDE, name, started_ns, ended_ns, cpu_ns, cpu_ns, None, UNSHARED))
        try:
            for key, model in models.items():
                rows = rows_that_fit(model, self._settings)
                with self._changed:
                    for executor in self._executors:
                        executor.running[key] = ()
                    self._waiting[key], self._rows[key] = [], rows
            warm = [
                self._send(executor, partial(self._adopt, executor, workers, models))
                for executor, workers in zip(self._executors, opened.workers, strict=True)
            ]
            for future in warm:
                future.result()
            with self._changed:
                self._manifests.update({key: model.manifest for key, model in models.items()})
        except BaseException:
            for key in models:
                self.unload(key)
            raise
        # Steps are as right without, and where memory is in pieces this takes as long as all of the above.
        threading.Thread(target=enlarge_pages, args=(opened.pages,), name="pages", daemon=True).start()

    def unload(self, key: str) -> None:
        """Forget a model and free its memory; returns when every executor has. What it had not finished fails."""
        with self._changed:
            self._manifests.pop(key, None)
            unfinished, self._waiting[key] = self._waiting.get(key, []), []
            self._leave(unfinished)
        gone = [self._send(executor, partial(executor.drop, key)) for executor in self._executors]
        for future in gone:
            unfinished += future.result()
        with self._changed:
            del self._waiting[key]
            self._rows.pop(key, None)
            for executor in self._executors:
                executor.running.pop(key, None)
        for job in unfinished:
            _answer(job, EngineClosed("the model was unloaded before this was done"))

    def submit(self, model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        """Queue all ``items`` for ``model``, or none. Where those of several ``key`` wait, keys take turns.

        Raises ``Overloaded``, ``EngineClosed``, ``KeyError`` for an unknown model and ``ValueError`` for an item that
        the model cannot compute.
        """
        manifest, rows = self._manifests[model], self._rows[model]
        for item in items:
            _check(item, manifest, rows)
        now_ns = time.monotonic_ns()
        every = [Job(item, now_ns, key) for item in items]
        known = {job: output for job in every if (output := self._reuse.find(model, job.item)) is not None}
        jobs = [job for job in every if job not in known]
        with self._changed:
            if not self._accepts:
                raise self._gone("the engine is draining and takes no more work")
            if model not in self._manifests:
                raise KeyError(model)
            self._drop_cancelled(model)
            self._turns.join(key, self._backlog.by_key)
            self._backlog.enter(len(jobs), sum(job.tokens for job in jobs), key)
            self._waiting[model] += jobs
            self._changed.notify_all()
        for job, output in known.items():
            job.ticket.future.set_result(output)
        return [job.ticket for job in every]

    def queue_depth(self) -> int:
        """Items that wait for their first step."""
        with self._changed:
            return self._backlog.items

    def running(self) -> int:
        """Items that are being computed."""
        with self._changed:
            return sum(len(jobs) for executor in self._executors for jobs in executor.running.values())

    def drain(self, timeout_s: float) -> None:
        """Refuse new work from now on; returns when what was accepted is done, or after ``timeout_s``."""
        with self._changed:
            self._accepts = False
            self._changed.wait_for(self._is_idle, timeout_s)

    def close(self) -> None:
        """Stop after the steps that are running; what is unfinished fails with ``EngineClosed``."""
        with self._changed:
            self._accepts = self._lives = False
            self._changed.notify_all()
        # Where it has failed, it closes itself, and is closed once more.
        with self._closing:
            for thread in self._threads:
                thread.join()
            for executor in self._executors:
                while executor.errands:
                    executor.errands.popleft().future.set_exception(self._gone("the engine was closed"))
            unfinished = [job for jobs in self._waiting.values() for job in jobs]
            for executor in self._executors:
                unfinished += [job for jobs in executor.running.values() for job in jobs]
            for job in unfinished:
                if not job.ticket.future.done():
                    _answer(job, self._gone("the engine was closed before this was done"))

    def _gone(self, why: str) -> EngineClosed:
        return self.lost or EngineClosed(why)

    def _is_idle(self) -> bool:
        return not self._backlog.items and not any(any(each.running.values()) for each in self._executors)

    def _send(self, executor: Executor, work: Callable[[], Any]) -> "Future[Any]":
        """Have the thread of ``executor`` do ``work`` between two steps."""
        errand = Errand(work)
        with self._changed:
            if not self._lives:
                raise self._gone("the engine was closed")
            executor.errands.append(errand)
            self._changed.notify_all()
        return errand.future

    def _adopt(self, executor: Executor, workers: Mapping[str, Worker], models: Mapping[str, LoadedModel]) -> None:
        """Let ``executor`` take on the workers of ``models``."""
        for key, worker in workers.items():
            self._record(executor.adopt(key, worker, models[key].manifest.name))

    def _live(self, executor: Executor) -> None:
        """The life of an executor's thread."""
        executor.pin()
        try:
            while (work := self._next(executor)) is not None:
                work()
        except Exception:
            # Failed steps and errands are answered, and the thread goes on; a lost GPU is lost to this process.
            _log.critical("%s has failed: the service must be started anew", executor.device, exc_info=True)
            with self._changed:
                self.lost = EngineFailed(executor.device)
                self._accepts = False
            # No thread can wait for itself.
            threading.Thread(target=self.close, name="close").start()

    def _next(self, executor: Executor) -> Callable[[], None] | None:
        """Wait until there is something to do for ``executor``: an errand, or a step of a model, which is handed its
        jobs. None at the end."""
        with self._changed:
            while self._lives:
                if executor.errands:
                    return executor.errands.popleft().run
                for model in executor.order:
                    if self._hand_over(executor, model) or executor.workers[model].busy:
                        executor.served(model)
                        return partial(self._step, executor, model)
                self._changed.wait()
        return None

    def _hand_over(self, executor: Executor, model: str) -> bool:
        """Let the worker of ``model`` take waiting jobs, if it can begin any."""
        if self._waiting[model]:
            self._drop_cancelled(model)
        waiting, worker = self._waiting[model], executor.workers[model]
        share = self._share(executor, model, waiting)
        if not share:
            return False
        shared = len(self._backlog.by_key) > 1
        window = self._turns.first(waiting, _SHARED_WINDOW) if shared else waiting[:_WINDOW]
        taken = set(worker.take(window, share))
        self._waiting[model] = [job for job in waiting if job not in taken]
        for key, tokens in self._leave(taken):
            self._turns.charge(key, tokens)
        executor.running[model] = (*executor.running[model], *taken)
        return bool(taken)

    def _share(self, executor: Executor, model: str, waiting: Sequence[Job]) -> int:
        """How much of the ``waiting`` jobs ``executor`` should begin now."""
        if not waiting:
            return 0
        worker = executor.workers[model]
        running = sum([worker.load(each.running[model]) for each in self._executors])
        executors = sum([model in each.workers for each in self._executors])
        share = fair_share(worker.load(waiting), worker.load(executor.running[model]), running, executors)
        return 0 if worker.holds_off(waiting, share) else share

    def _step(self, executor: Executor, model: str) -> None:
        """Run one step, record it, and answer what ended."""
        worker = executor.workers[model]
        turn = worker.turn()
        new_tokens, elapsed_s = 0, 0.0
        written: list[tuple[str, int]] = []
        if turn is not None:
            step, ended = executor.run(model, turn, lambda: self._is_wanted(executor))
            self._record(step)
            for job, result in ended:
                if isinstance(result, Written):
                    written.append((job.key, len(result.ids) * job.rows))
                output = _answer(job, result, executor.device)
                if output is not None:
                    self._reuse.keep(model, job.item, output)
            if turn.work.phase is not Phase.DECODE:
                new_tokens = sum([job.tokens for job in turn.jobs if job.started_ns == step.started_ns])
            elapsed_s = (step.ended_ns - step.started_ns) / _NS_PER_S
        with self._changed:
            executor.running[model] = worker.jobs
            for key, tokens in written:
                self._turns.charge(key, tokens)
            self._backlog.stepped(new_tokens, elapsed_s / len(self._executors))
            if not executor.running[model] and self._is_idle():
                self._changed.notify_all()

    def _is_wanted(self, executor: Executor) -> bool:
        """Whether there may be something else to do for ``executor``. Without the lock: what comes too late for this
        look is seen at the next one."""
        if executor.errands or not self._lives:
            return True
        # Jobs wait only for models that every executor has, until it has dropped them, which is an errand.
        return bool(self._backlog.items) and any(
            [self._share(executor, model, waiting) for model, waiting in list(self._waiting.items())]
        )

    def _record(self, step: Step) -> None:
        try:
            self._recorder(step)
        except Exception:
            # The device must go on serving; whoever reads the account sees the gap.
            _log.exception("a step of %s was not recorded", step.model)

    def _drop_cancelled(self, model: str) -> None:
        """Forget waiting jobs that nobody waits for."""
        gone = [job for job in self._waiting[model] if job.cancelled]
        if gone:
            self._waiting[model] = [job for job in self._waiting[model] if not job.cancelled]
            self._leave(gone)
            if self._is_idle():
                self._changed.notify_all()

    def _leave(self, jobs: Collection[Job]) -> list[tuple[str, int]]:
        """Count jobs out of the queue; returns the keys that have any among them, and their tokens."""
        left = []
        for key in {job.key for job in jobs}:
            own = [job.tokens for job in jobs if job.key == key]
            self._backlog.leave(len(own), sum(own), key)
            left.append((key, sum(own)))
        return left


def _check(item: Item, manifest: Manifest, max_rows: int) -> None:
    """Raise ``ValueError`` for what the model's graphs cannot compute."""
    config = manifest.config
    length, limit = len(item.input_ids), config.max_positions
    match item:
        case EncodeItem():
            fits = config.architecture == "encoder"
            if item.token_types and len(item.token_types) != length:
                raise ValueError(f"{len(item.token_types)} token types for {length} tokens")
            if item.wants_vector and not (config.vector_layers or config.head == "embed"):
                raise ValueError(f"{manifest.name} gives no vectors")
            if not all(0 <= kind < config.n_token_types for kind in item.token_types):
                raise ValueError(f"a token type is not one of the {config.n_token_types} that {manifest.name} knows")
        case ExtractItem():
            fits = config.extract_head
        case WriteItem():
            fits = config.head == "lm"
            if config.architecture != "encoder-decoder":
                limit -= 1  # room for the first token written
            if item.sampling.max_tokens < 1:
                raise ValueError(f"a text of {item.sampling.max_tokens} tokens cannot be written")
            most = min(max_rows, config.vocab_size // 2)
            if not 1 <= item.sampling.beams <= most:
                raise ValueError(f"{item.sampling.beams} beams; at most {most} are possible")
    if not fits:
        raise ValueError(f"{manifest.name} does not take an item of the kind {type(item).__name__}")
    if not 1 <= length <= limit:
        raise ValueError(f"{length} tokens; {manifest.name} reads 1 to {limit}")
    # A graph that fails at an id fails for everybody in the step.
    if min(item.input_ids) < 0 or max(item.input_ids) >= config.vocab_size:
        raise ValueError(f"a token id is not one of the {config.vocab_size} that {manifest.name} knows")


def _answer(job: Job, result: Result, device: str = "") -> Output | None:
    """Answer whoever waits, on ``device`` for a while; returns the output, if it is one and somebody waited."""
    future = job.ticket.future
    # From here on it cannot be cancelled any more; False where it already is.
    if not future.set_running_or_notify_cancel():
        return None
    started_ns = job.submitted_ns if job.started_ns is None else job.started_ns
    load = Load(device, job.load_ns)
    timing = Timing(started_ns - job.submitted_ns, job.compute_ns, load)
    output: Output
    match result:
        case Exception():
            future.set_exception(result)
            return None
        case Written():
            output = WriteOutput(result.ids, result.finish_reason, timing, result.logprobs)
        case _:
            output = EncodeOutput(result, timing)
    future.set_result(output)
    return output
