"""All knowledge bases of a folder: opens, lists and deletes them, searches them, and puts documents into them.

Knows nothing of HTTP or of what passages are read for.
"""

import asyncio
import functools
import logging
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from energy.types import Phase, Step, step_beside
from service.caller import caller
from service.engine.types import EncodeItem, Item, Overloaded, Ticket
from service.errors import InvalidValue, KnowledgeBaseNotFound, KnowledgeUnavailable
from service.knowledge.documents import Document
from service.knowledge.ingest import Progress, ingest
from service.knowledge.store import DocumentSummary, Passage, Store
from service.models import Model, Models
from service.tasks.base import scored

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
Retrieval = Literal["bm25", "bm25+dense"]
_SUFFIX = ".sqlite"
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What knowledge bases ask of an engine."""

    def submit(self, model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        """Queue all items or none, for a ``key``'s holder."""


@dataclass(frozen=True, slots=True)
class Description:
    """A base in figures."""

    name: str
    documents: int
    passages: int
    retrieval: Retrieval
    embedding_model: str | None
    """The model whose vectors are searched; None where only words are."""
    size_bytes: int
    created_s: float


def find_embedder(models: Models) -> Model | None:
    """The first loaded model that turns texts into vectors."""
    return next((model for model in models.served.values() if model.manifest.config.head == "embed"), None)


class Knowledge:
    """The bases of ``folder``, one file each; methods that are not coroutines may be called from any thread.

    Steps of searching and indexing go to ``record``; those of the embedding model are the engine's.
    """

    def __init__(
        self,
        folder: Path,
        max_documents: int,
        engine: Engine,
        embedder: Model | None,
        record: Callable[[Step], object],
    ) -> None:
        self._folder, self._max_documents = folder, max_documents
        self._engine, self._embedder, self._record = engine, embedder, record
        self._key = None if embedder is None else embedder.fingerprint
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}

    @property
    def name(self) -> str:
        """What does the work of a search, for bills and metrics."""
        return "bm25" if self._embedder is None else self._embedder.name

    def describe(self, name: str) -> Description:
        """One base. Raises ``KnowledgeBaseNotFound``."""
        contents = self._open(name).contents()
        dense = self._key is not None and contents.embedded.get(self._key, 0) == contents.passages
        return Description(
            name=name,
            documents=contents.documents,
            passages=contents.passages,
            retrieval="bm25+dense" if dense else "bm25",
            embedding_model=self._embedder.name if dense and self._embedder else None,
            size_bytes=contents.size_bytes,
            created_s=contents.created_s,
        )

    def describe_all(self) -> list[Description]:
        """Every base, by name; one that cannot be read is left out and logged."""
        found = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                found.append(self.describe(path.name.removesuffix(_SUFFIX)))
            except (KnowledgeBaseNotFound, KnowledgeUnavailable) as error:
                _log.warning("the knowledge base %s is not listed: %s", path.name, error)
        return found

    def documents(self, name: str, after: str, limit: int) -> Sequence[DocumentSummary]:
        """At most ``limit`` documents of a base, in the order of their ids, from behind the id ``after``."""
        return self._open(name).summaries(after, limit)

    def document(self, name: str, document_id: str) -> Document:
        """A document as it was put. Raises ``KnowledgeBaseNotFound`` or ``DocumentNotFound``."""
        return self._open(name).find(document_id)

    def delete_document(self, name: str, document_id: str) -> None:
        """Forget a document. Raises ``KnowledgeBaseNotFound`` or ``DocumentNotFound``."""
        self._open(name).remove(document_id)

    def delete(self, name: str) -> None:
        """Forget a base, all of it. Raises ``KnowledgeBaseNotFound``."""
        store = self._open(name)
        with self._lock:
            self._stores.pop(name, None)
            store.delete()

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            while self._stores:
                self._stores.popitem()[1].close()

    async def search(self, name: str, questions: Sequence[str], passages: int, request_id: str) -> list[list[Passage]]:
        """The best ``passages`` passages for each question; what it costs is on the request's bill.

        Raises ``KnowledgeBaseNotFound``, and what the engine raises.
        """
        store = await asyncio.to_thread(self._open, name)
        vectors: Sequence[NDArray[np.float32] | None] = [None] * len(questions)
        if self._embedder is not None and await asyncio.to_thread(store.is_dense):
            vectors = list((await self._embed(self._embedder, request_id, questions)).astype(np.float32))

        def search_all() -> list[list[Passage]]:
            return [store.search(*each, passages) for each in zip(questions, vectors, strict=True)]

        found: list[list[Passage]] = await self._timed(Phase.RETRIEVE, request_id, search_all)
        return found

    async def ingest(self, name: str, documents: Sequence[Document], request_id: str) -> AsyncGenerator[Progress]:
        """Put ``documents`` into a base, which is made where there is none; the cost is on the request's bill.

        Raises ``InvalidValue`` before anything is stored where they are too many.
        """
        store = await asyncio.to_thread(self._make, name, [document.id for document in documents])
        indexing = functools.partial(self._timed, Phase.INDEX, request_id)
        embed = None
        if self._embedder is not None:
            embed = functools.partial(self._embed_patiently, self._embedder, request_id)
        async for progress in ingest(store, documents, indexing, embed):
            yield progress

    def _open(self, name: str) -> Store:
        if not re.fullmatch(NAME_PATTERN, name):
            raise KnowledgeBaseNotFound(name)
        with self._lock:
            store = self._stores.get(name)
            if store is None:
                store = Store(self._folder / f"{name}{_SUFFIX}", self._key)
                if not store.exists():
                    raise KnowledgeBaseNotFound(name)
                self._stores[name] = store
            return store

    def _make(self, name: str, document_ids: Sequence[str]) -> Store:
        """Open a base that has room for the documents; make it where it is missing."""
        if not re.fullmatch(NAME_PATTERN, name):
            raise InvalidValue("name", "a to z, 0 to 9, dot, dash and underscore; 64 at most, a letter or digit first")
        try:
            store = self._open(name)
            documents = store.contents().documents + store.missing(document_ids)
        except KnowledgeBaseNotFound:
            store, documents = None, len(document_ids)
        if documents > self._max_documents:
            raise InvalidValue("documents", f"the base would hold {documents}; at most {self._max_documents} may be")
        if store is None:
            with self._lock:
                try:
                    self._folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise KnowledgeUnavailable(f"its folder cannot be made: {error.strerror}") from error
                Store(self._folder / f"{name}{_SUFFIX}", self._key).create()
            store = self._open(name)
        return store

    async def _embed(self, embedder: Model, request_id: str, texts: Sequence[str]) -> NDArray[np.float16]:
        """Vectors of unit length, ``(texts, d)``, as precise as they are stored: a search finds the same later."""
        items = await asyncio.to_thread(_items, embedder, request_id, texts)
        tickets = self._engine.submit(embedder.key, items, caller().name or "")
        try:
            outputs = await asyncio.gather(*(asyncio.wrap_future(ticket.future) for ticket in tickets))
        finally:
            for ticket in tickets:
                ticket.future.cancel()
        vectors = np.stack([scored(output) for output in outputs])
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return vectors.astype(np.float16)

    async def _embed_patiently(self, embedder: Model, request_id: str, texts: Sequence[str]) -> NDArray[np.float16]:
        """As ``_embed``, but a full queue makes it wait: who puts documents has time, who asks has not."""
        while True:
            try:
                return await self._embed(embedder, request_id, texts)
            except Overloaded as overload:
                await asyncio.sleep(overload.retry_after_s)

    async def _timed(self, phase: Phase, request_id: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do ``work`` on a thread of its own, as a step that is billed to the request."""

        def timed() -> Any:
            started_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
            try:
                return work(*arguments)
            finally:
                spent_ns, ended_ns = time.thread_time_ns() - cpu_ns, time.monotonic_ns()
                self._record(step_beside(self.name, request_id, phase, started_ns, ended_ns, spent_ns))

        return await asyncio.to_thread(timed)


def _items(embedder: Model, request_id: str, texts: Sequence[str]) -> list[EncodeItem]:
    """Each text as the model reads it: cut where it is too long, and never nothing."""
    tokenizer, manifest = embedder.tokenizer, embedder.manifest
    room = manifest.max_input_tokens - tokenizer.num_special_tokens_to_add(is_pair=False)
    items = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        encoding.truncate(room)
        ids = tokenizer.post_process(encoding).ids
        items.append(EncodeItem(request_id, tuple(ids) or (manifest.special_ids.pad,)))
    return items
