"""Which models are in memory, and which only on disk: loads, swaps, unloads and evicts them. Knows nothing of tasks.

A model on disk is loaded by the first request that needs it. Where the memory for models is full, the one that has
been idle longest makes room; where none is idle, the one used longest ago takes no new requests and leaves when those
it has are over. A folder is verified again at every load: one that was altered is refused then, and does not disturb
what runs, which computes with what was read.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from models.manifest import ArtefactError, Manifest
from service.engine.types import EngineClosed, Overloaded
from service.errors import ModelInUse, ModelNotFound, ModelRefused, ModelUnavailable
from service.metrics import Metrics
from service.models import Model, Models, find_folder, load_model, refusal_of

MAX_WAITING = 64
"""Requests that wait for models at once; the next are told to come again."""
_FIRST_GUESS_S = 1.0
State = Literal["loaded", "loading", "on disk"]
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What a repository asks of an engine."""

    def memory_of(self, model: Model) -> int:
        """Most bytes that a model takes in memory. Raises ``ArtefactError``."""

    def load(self, models: Mapping[str, Model]) -> None:
        """Load models under their keys, all or none. Raises ``ArtefactError``. Takes a while."""

    def unload(self, key: str) -> None:
        """Forget a model. Takes a while."""


@dataclass(slots=True, eq=False)
class _Held:
    """A model in memory."""

    model: Model
    memory_bytes: int
    users: int = 0
    used_s: float = field(default_factory=time.monotonic)
    """When it was last of use."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nobody uses it."""

    def __post_init__(self) -> None:
        self.idle.set()


class Repository:
    """The models of one service; but for ``fill``, all of it is used on the event loop."""

    def __init__(
        self,
        models: Models,
        engine: Engine,
        metrics: Metrics,
        *,
        roots: Sequence[Path],
        check: Callable[[Manifest], None],
        on_load: Callable[[Model], None] | None = None,
        max_bytes: int | None = None,
        pinned: Collection[str] = (),
    ) -> None:
        """``models`` are known, and none of them is in memory. ``check`` raises ``ArtefactError`` for a manifest that
        no task can work with; ``on_load`` is told of a model before it is open to requests. Models called as one of
        ``pinned`` are never evicted, unloaded or replaced. None is no limit of memory."""
        self.models = models
        self._engine, self._metrics, self._roots, self._check = engine, metrics, roots, check
        self._on_load, self._max_bytes, self._pinned = on_load, max_bytes, pinned
        self._held: dict[str, _Held] = {}
        """In memory and open to requests, by the model's key."""
        self._leaving: dict[_Held, asyncio.Task[None]] = {}
        """In memory as long as requests that have begun with them run."""
        self._loading: dict[Path, asyncio.Task[Model]] = {}
        self._turn = asyncio.Lock()
        """Loads come one after the other."""
        self._generations = itertools.count(1)
        self._waiting = 0
        self._load_s = _FIRST_GUESS_S
        metrics.watch_models(lambda: self.memory_bytes, lambda: self._waiting)

    @property
    def memory_bytes(self) -> int:
        """Most bytes that the models in memory take."""
        return sum(held.memory_bytes for held in (*self._held.values(), *self._leaving))

    def fill(self) -> None:
        """Load the models that there is room for, the pinned ones first; before any request comes.

        Raises ``ArtefactError`` for a model that the engine does not run.
        """
        for model in sorted(self.models.served.values(), key=lambda model: model.name not in self._pinned):
            memory_bytes = self._engine.memory_of(model)
            if model.name in self._pinned or self._fits(memory_bytes):
                self._held[model.key] = _Held(model, memory_bytes)
        self._engine.load({key: held.model for key, held in self._held.items()})

    def state(self, model: Model) -> State:
        """Where a served model is."""
        if model.key in self._held:
            return "loaded"
        return "loading" if model.folder in self._loading else "on disk"

    def memory_of(self, model: Model) -> int:
        """Most bytes that a served model takes in memory, or would."""
        held = self._held.get(model.key)
        return self._engine.memory_of(model) if held is None else held.memory_bytes

    @asynccontextmanager
    async def use(self, model: Model) -> AsyncIterator[Model]:
        """Hold ``model`` in memory, or its newest revision where it was not.

        Raises ``Overloaded`` where too many wait for models already, ``ModelNotFound`` where it was unloaded
        meanwhile, and ``ModelUnavailable`` where it cannot be loaded.
        """
        held = self._held.get(model.key) or await self._bring(model.name)
        held.users += 1
        held.idle.clear()
        try:
            yield held.model
        finally:
            held.users -= 1
            held.used_s = time.monotonic()
            if not held.users:
                held.idle.set()

    async def load(self, name: str) -> Model:
        """Load the model called ``name``, or in the folder of that name, from disk. It takes the place of the one
        that is called alike, whose running requests finish.

        Raises ``ModelNotFound``, ``ModelInUse`` and ``ModelRefused``.
        """
        folder = await asyncio.to_thread(find_folder, self._roots, name, self.models)
        if folder is None:
            raise ModelNotFound(name, list(self.models.served))
        return await self._load_once(folder)

    async def unload(self, name: str) -> Model:
        """Serve the model called ``name`` no more until it is loaded again; returns when its requests are over.

        Raises ``ModelNotFound`` and ``ModelInUse``.
        """
        model = self.models.named(name)
        if model.name in self._pinned:
            raise ModelInUse(model.name)
        loading = self._loading.get(model.folder)
        if loading is not None:
            # Once it is there, it would be served again.
            await asyncio.wait([loading])
            model = self.models.named(name)
        self.models = self.models.without(model.name)
        held = self._held.get(model.key)
        if held is not None:
            await asyncio.shield(self._retire(held, "asked"))
        return model

    async def _bring(self, name: str) -> _Held:
        """Wait until the model called ``name`` is in memory."""
        if self._waiting >= MAX_WAITING:
            raise Overloaded(self._load_s)
        self._waiting += 1
        try:
            while True:
                model = self.models.named(name)
                if model.key in self._held:
                    return self._held[model.key]
                await self._load_once(model.folder)
        except (ModelRefused, ModelInUse) as error:
            raise ModelUnavailable(name, str(error)) from error
        finally:
            self._waiting -= 1

    async def _load_once(self, folder: Path) -> Model:
        """Load a folder, or wait for the load that goes on; it goes on too when nobody waits any longer."""
        task = self._loading.get(folder)
        if task is None:
            task = self._loading[folder] = asyncio.create_task(self._load(folder))
            task.add_done_callback(lambda done: self._loaded(folder, done))
        return await asyncio.shield(task)

    def _loaded(self, folder: Path, task: "asyncio.Task[Model]") -> None:
        del self._loading[folder]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the model folder %s was not loaded: %s", folder.name, error)

    async def _load(self, folder: Path) -> Model:
        async with self._turn:
            started_s = time.monotonic()
            try:
                model = await asyncio.to_thread(self._read, folder)
                if model.name in self._pinned:
                    raise ModelInUse(model.name)
                memory_bytes = self._engine.memory_of(model)
                await self._make_room(memory_bytes)
                await asyncio.to_thread(self._engine.load, {model.key: model})
            except (ArtefactError, OSError) as error:
                refusal = refusal_of(folder, error)
                intact = [each.key for each in self.models.served.values() if each.folder != folder]
                self.models = self.models.refusing(refusal, keep=(*intact, *self._held))
                raise ModelRefused(refusal.folder_name, refusal.reason) from error
            self._load_s = time.monotonic() - started_s
            if self._on_load is not None:
                self._on_load(model)
            old = [held for held in self._held.values() if held.model.name == model.name]
            self._held[model.key] = _Held(model, memory_bytes)
            self.models = self.models.replacing(model)
            for held in old:
                self._retire(held, "replaced")
        self._metrics.model_loaded(model.name, self._load_s)
        _log.info("loaded %s, revision %s, in %.2f s", model.name, model.manifest.revision, self._load_s)
        return model

    def _read(self, folder: Path) -> Model:
        model = load_model(folder)
        self._check(model.manifest)
        return replace(model, generation=next(self._generations))

    def _fits(self, memory_bytes: int) -> bool:
        return self._max_bytes is None or self.memory_bytes + memory_bytes <= self._max_bytes

    async def _make_room(self, memory_bytes: int) -> None:
        """Evict until ``memory_bytes`` more fit. Raises ``ArtefactError`` where they never will."""
        for_ever = sum(held.memory_bytes for held in self._held.values() if held.model.name in self._pinned)
        if self._max_bytes is not None and for_ever + memory_bytes > self._max_bytes:
            raise ArtefactError(
                f"it takes {memory_bytes / 1e6:,.0f} MB, and {(self._max_bytes - for_ever) / 1e6:,.0f} MB can be had: "
                "raise max_models_mb"
            )
        while not self._fits(memory_bytes):
            evictable = [held for held in self._held.values() if held.model.name not in self._pinned]
            if evictable:
                await self._retire(min(evictable, key=lambda held: (held.users > 0, held.used_s)), "evicted")
            else:
                await asyncio.wait(self._leaving.values(), return_when=asyncio.FIRST_COMPLETED)

    def _retire(self, held: _Held, reason: str) -> "asyncio.Task[None]":
        """Open a model to no more requests, and let it go when those it has are over."""
        del self._held[held.model.key]
        task = self._leaving[held] = asyncio.create_task(self._leave(held, reason))
        return task

    async def _leave(self, held: _Held, reason: str) -> None:
        await held.idle.wait()
        try:
            await asyncio.to_thread(self._engine.unload, held.model.key)
        except EngineClosed:
            return
        finally:
            del self._leaving[held]
        self._metrics.model_left(held.model.name, reason)
        _log.info("let go of %s, revision %s: %s", held.model.name, held.model.manifest.revision, reason)
