"""One knowledge base as one SQLite file: documents, their passages, the full-text index and the vectors.

Knows nothing of models, engines or HTTP. Every change is one transaction on whole documents, so that a process that
is killed leaves only whole documents behind; readers go on reading meanwhile (WAL), each at one moment in time.
"""

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import DocumentNotFound, KnowledgeUnavailable
from service.knowledge.documents import Document
from service.knowledge.search import fuse, match_expression
from service.knowledge.vectors import Snapshot, Vectors

SCHEMA_VERSION = 1
RANKING_DEPTH = 100
"""How many passages each ranking gives to the fusion."""
_BUSY_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)

# Passage numbers are never given twice, so that a number stands for the same text for ever. The index keeps no text
# of its own (content=''): to forget a passage it must be told its text once more, which documents have.
_SCHEMA = f"""
CREATE TABLE base (created_s REAL NOT NULL, changes INTEGER NOT NULL);
CREATE TABLE documents (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    text TEXT NOT NULL,
    characters INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    markdown INTEGER NOT NULL
);
CREATE TABLE passages (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    document INTEGER NOT NULL,
    begins INTEGER NOT NULL,
    ends INTEGER NOT NULL
);
CREATE INDEX passages_by_document ON passages (document);
CREATE TABLE vectors (passage INTEGER PRIMARY KEY, model TEXT NOT NULL, vector BLOB NOT NULL);
CREATE INDEX vectors_by_model ON vectors (model);
CREATE VIRTUAL TABLE terms USING fts5 (
    text, content='', tokenize="porter unicode61 remove_diacritics 2"
);
PRAGMA user_version = {SCHEMA_VERSION};
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A document that is ready to be stored."""

    document: Document
    passages: Sequence[tuple[int, int]]
    vectors: NDArray[np.float16] | None = None
    """``(passages, d)``; None where no embedding model is loaded."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Part of a document that a search found."""

    document: str
    start: int
    end: int
    text: str
    metadata: Mapping[str, Any]
    score: float


@dataclass(frozen=True, slots=True)
class DocumentSummary:
    """One line of a base's list of documents."""

    id: str
    characters: int
    passages: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a base holds."""

    documents: int
    passages: int
    embedded: Mapping[str, int]
    """Passages that have a vector, by embedding model."""
    size_bytes: int
    created_s: float


class Store:
    """The base in the file ``path``; every method may be called from any thread.

    All raise ``KnowledgeUnavailable`` where the file cannot be read or written.
    """

    def __init__(self, path: Path, embedder: str | None) -> None:
        """``embedder`` names the model whose vectors are searched."""
        self._path, self._embedder = path, embedder
        self._writer = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._vectors = Vectors()
        self._closed = False

    def create(self) -> None:
        """Make the file what it must be; nothing changes where it is that already."""
        with self._writing() as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement)
                database.execute("INSERT INTO base VALUES (?, 0)", (time.time(),))

    def exists(self) -> bool:
        """Whether the file is a knowledge base of this version; one of another version is an error."""
        if not self._path.is_file():
            return False
        with self._reading() as database:
            version: int = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise KnowledgeUnavailable(f"its format has version {version}; this program reads {SCHEMA_VERSION}")
        return version == SCHEMA_VERSION

    def put(self, entries: Sequence[Entry]) -> int:
        """Add documents, each in the place of one with the same id; returns how many were replaced."""
        replaced = 0
        with self._writing() as database:
            for entry in entries:
                replaced += _remove(database, entry.document.id)
                _add(database, entry, self._embedder)
            database.execute("UPDATE base SET changes = changes + 1")
        return replaced

    def remove(self, document_id: str) -> None:
        """Forget a document. Raises ``DocumentNotFound``."""
        with self._writing() as database:
            if not _remove(database, document_id):
                raise DocumentNotFound(document_id)
            database.execute("UPDATE base SET changes = changes + 1")

    def find(self, document_id: str) -> Document:
        """A document as it was put. Raises ``DocumentNotFound``."""
        with self._reading() as database:
            row = database.execute(
                "SELECT id, text, metadata, markdown FROM documents WHERE id = ?", (document_id,)
            ).fetchone()
        if row is None:
            raise DocumentNotFound(document_id)
        return Document(row[0], row[1], json.loads(row[2]), bool(row[3]))

    def summaries(self, after: str, limit: int) -> Sequence[DocumentSummary]:
        """At most ``limit`` documents in the order of their ids, from behind the id ``after``."""
        query = (
            "SELECT id, characters, (SELECT count(*) FROM passages WHERE document = documents.number)"
            " FROM documents WHERE id > ? ORDER BY id LIMIT ?"
        )
        with self._reading() as database:
            return [DocumentSummary(*row) for row in database.execute(query, (after, limit))]

    def contents(self) -> Contents:
        """How much there is."""
        with self._reading() as database:
            return Contents(
                documents=_one(database, "SELECT count(*) FROM documents"),
                passages=_one(database, "SELECT count(*) FROM passages"),
                embedded=dict(database.execute("SELECT model, count(*) FROM vectors GROUP BY model").fetchall()),
                size_bytes=_one(database, "PRAGMA page_count") * _one(database, "PRAGMA page_size"),
                created_s=_one(database, "SELECT created_s FROM base"),
            )

    def missing(self, document_ids: Sequence[str]) -> int:
        """How many of ``document_ids`` are new."""
        with self._reading() as database:
            find = "SELECT 1 FROM documents WHERE id = ?"
            return sum(database.execute(find, (each,)).fetchone() is None for each in document_ids)

    def is_dense(self) -> bool:
        """Whether every passage has a vector of the embedder."""
        with self._reading() as database:
            return self._embedder is not None and self._snapshot(database, self._embedder).complete

    def search(self, question: str, vector: NDArray[np.float32] | None, limit: int) -> list[Passage]:
        """The ``limit`` passages that bear most on ``question``, best first: BM25, fused with the nearness to
        ``vector`` (d,) where there is one and every passage has its own."""
        with self._reading() as database:
            rankings = [_by_words(database, question)]
            if vector is not None and self._embedder is not None:
                snapshot = self._snapshot(database, self._embedder)
                if snapshot.complete:
                    rankings.append(snapshot.nearest(vector, RANKING_DEPTH))
            return _passages(database, fuse(rankings)[:limit])

    def delete(self) -> None:
        """Remove the file; what is being read is read to its end, and nothing can be written any more."""
        with self._writer, _explained():
            self.close()
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the file; what is being read is read to its end."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _snapshot(self, database: sqlite3.Connection, embedder: str) -> Snapshot:
        return self._vectors.at(database, embedder, _one(database, "SELECT changes FROM base"))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection on which everything is seen as of one moment."""
        with _explained():
            try:
                database = self._idle.pop()
            except IndexError:
                database = self._connect()
            try:
                database.execute("BEGIN")
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.close()
                raise
            self._idle.append(database)
            if self._closed:
                self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept all or none."""
        with self._writer, _explained():
            if self._closed:
                raise KnowledgeUnavailable("it has been deleted, or the service is shutting down")
            database = self._connect()
            try:
                database.execute("PRAGMA journal_mode = WAL")
                # What was acknowledged must survive the loss of power too.
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            finally:
                # An open transaction is rolled back.
                database.close()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


@contextmanager
def _explained() -> Iterator[None]:
    """Tell callers what SQLite says, which names no path."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        _log.warning("a knowledge base cannot be used: %s", error)
        raise KnowledgeUnavailable(str(error) if isinstance(error, sqlite3.Error) else str(error.strerror)) from error


def _add(database: sqlite3.Connection, entry: Entry, embedder: str | None) -> None:
    document = entry.document
    number = database.execute(
        "INSERT INTO documents (id, text, characters, metadata, markdown) VALUES (?, ?, ?, ?, ?)",
        (document.id, document.text, len(document.text), json.dumps(document.metadata), document.markdown),
    ).lastrowid
    for place, (start, end) in enumerate(entry.passages):
        passage = database.execute(
            "INSERT INTO passages (document, begins, ends) VALUES (?, ?, ?)", (number, start, end)
        ).lastrowid
        database.execute("INSERT INTO terms (rowid, text) VALUES (?, ?)", (passage, document.text[start:end]))
        if entry.vectors is not None:
            row = (passage, embedder, entry.vectors[place].tobytes())
            database.execute("INSERT INTO vectors VALUES (?, ?, ?)", row)


def _remove(database: sqlite3.Connection, document_id: str) -> bool:
    """Whether there was such a document."""
    row = database.execute("SELECT number, text FROM documents WHERE id = ?", (document_id,)).fetchone()
    if row is None:
        return False
    number, text = row
    passages = database.execute("SELECT number, begins, ends FROM passages WHERE document = ?", (number,)).fetchall()
    for passage, start, end in passages:
        database.execute("INSERT INTO terms (terms, rowid, text) VALUES ('delete', ?, ?)", (passage, text[start:end]))
        database.execute("DELETE FROM vectors WHERE passage = ?", (passage,))
    database.execute("DELETE FROM passages WHERE document = ?", (number,))
    database.execute("DELETE FROM documents WHERE number = ?", (number,))
    return True


def _by_words(database: sqlite3.Connection, question: str) -> list[int]:
    """Numbers of the passages that share words with the question, best first (BM25)."""
    expression = match_expression(question)
    if expression is None:
        return []
    query = "SELECT rowid FROM terms WHERE terms MATCH ? ORDER BY rank LIMIT ?"
    return [number for (number,) in database.execute(query, (expression, RANKING_DEPTH))]


def _passages(database: sqlite3.Connection, ranking: Sequence[tuple[int, float]]) -> list[Passage]:
    """The passages of ``ranking``, with their texts."""
    documents: dict[int, tuple[str, str, Any]] = {}
    found = []
    for number, score in ranking:
        place = "SELECT document, begins, ends FROM passages WHERE number = ?"
        document, start, end = database.execute(place, (number,)).fetchone()
        if document not in documents:
            read = "SELECT id, text, metadata FROM documents WHERE number = ?"
            identity, text, metadata = database.execute(read, (document,)).fetchone()
            documents[document] = identity, text, json.loads(metadata)
        identity, text, metadata = documents[document]
        found.append(Passage(identity, start, end, text[start:end], metadata, score))
    return found


def _one(database: sqlite3.Connection, query: str) -> Any:
    return database.execute(query).fetchone()[0]
