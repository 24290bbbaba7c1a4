"""Puts documents into a base, batch by batch, and says how far it has come. Knows nothing of HTTP."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.knowledge.chunking import split_passages
from service.knowledge.documents import Document
from service.knowledge.store import Entry, Store

BATCH_CHARACTERS = 100_000
"""Text of one transaction; a longer document has one of its own."""
EMBED_PASSAGES = 32
"""Passages that the engine gets at a time: others' requests come in between."""

Embed = Callable[[Sequence[str]], Awaitable[NDArray[np.float16]]]
"""Texts to ``(texts, d)`` vectors of unit length."""


class Indexing(Protocol):
    """Runs work on the processor off the event loop, and bills it."""

    async def __call__(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` returns."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request's documents have come."""

    documents: int
    """Stored, whole and for good."""
    of: int
    passages: int
    """Cut, and embedded where an embedding model is loaded."""
    replaced: int
    """Documents that took the place of one with the same id."""


async def ingest(
    store: Store, documents: Sequence[Document], indexing: Indexing, embed: Embed | None
) -> AsyncIterator[Progress]:
    """Store ``documents`` in batches, each all or nothing; a step of progress after each, and after each embedding.

    Stopping in between leaves the batches that were stored; the same request once more completes them.
    """
    stored = passages = replaced = 0
    for batch in _batches(documents):
        cut = await indexing(_cut, batch)
        vectors: list[NDArray[np.float16] | None] = [None] * len(batch)
        if embed is None:
            passages += sum(map(len, cut))
        else:
            for place, (document, spans) in enumerate(zip(batch, cut, strict=True)):
                parts = []
                for first in range(0, len(spans), EMBED_PASSAGES):
                    part = spans[first : first + EMBED_PASSAGES]
                    parts.append(await embed([document.text[start:end] for start, end in part]))
                    passages += len(part)
                    yield Progress(stored, len(documents), passages, replaced)
                vectors[place] = np.concatenate(parts)
        replaced += await indexing(store.put, [Entry(*entry) for entry in zip(batch, cut, vectors, strict=True)])
        stored += len(batch)
        yield Progress(stored, len(documents), passages, replaced)


def _cut(batch: Sequence[Document]) -> list[list[tuple[int, int]]]:
    return [split_passages(document.text, document.markdown) for document in batch]


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if batch and characters + len(document.text) > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document.text)
    yield batch
