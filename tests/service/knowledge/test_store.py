"""A base keeps documents whole, finds their passages, forgets what it is told to, and lets readers be."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.errors import DocumentNotFound, KnowledgeUnavailable
from service.knowledge.documents import Document
from service.knowledge.store import Entry, Store


def entry(identity: str, *passages: str, vectors: NDArray[np.float16] | None = None) -> Entry:
    """A document of these passages."""
    text, spans = "", []
    for passage in passages:
        spans.append((len(text), len(text) + len(passage)))
        text += passage + "\n"
    return Entry(Document(identity, text, {"of": identity}), spans, vectors)


def unit(*values: float) -> NDArray[np.float16]:
    return np.array([values], np.float16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "a.sqlite", "embed:1")
    store.create()
    return store


def found(store: Store, question: str, vector: NDArray[np.float32] | None = None) -> list[tuple[str, int]]:
    return [(passage.document, passage.start) for passage in store.search(question, vector, 10)]


def test_what_was_put_is_found_as_it_was(store: Store) -> None:
    text = "Das Wasser.\n\x00 caf\u00e9 \U0001f600\u2028 Ende"
    store.put([Entry(Document("a/b c", text, {"n": [1, None]}, markdown=True), [(0, 11), (12, len(text))])])
    assert store.find("a/b c") == Document("a/b c", text, {"n": [1, None]}, markdown=True)
    (passage,) = store.search("CAFE?", None, 5)
    assert (passage.text, passage.metadata) == (text[12:], {"n": [1, None]})
    assert text[passage.start : passage.end] == passage.text
    with pytest.raises(DocumentNotFound, match="'a'"):
        store.find("a")


def test_a_document_replaces_the_one_of_its_id(store: Store) -> None:
    assert store.put([entry("a", "old river", "old sea"), entry("b", "old forest")]) == 0
    assert store.put([entry("a", "new river")]) == 1
    assert found(store, "old") == [("b", 0)]
    assert found(store, "sea") == []
    assert found(store, "river") == [("a", 0)]
    contents = store.contents()
    assert (contents.documents, contents.passages) == (2, 2)


def test_a_removed_document_is_gone_everywhere(store: Store) -> None:
    store.put([entry("a", "river", vectors=unit(1, 0)), entry("b", "river and sea", vectors=unit(0, 1))])
    store.remove("a")
    assert found(store, "river", np.array([1, 0], np.float32)) == [("b", 0)]
    with pytest.raises(DocumentNotFound):
        store.remove("a")
    assert store.contents().embedded == {"embed:1": 1}


def test_documents_are_listed_in_pages(store: Store) -> None:
    store.put([entry(name, *["x"] * number) for number, name in enumerate(("c", "a", "é", "b"), start=1)])
    first = store.summaries("", 2)
    assert [(each.id, each.characters, each.passages) for each in first] == [("a", 4, 2), ("b", 8, 4)]
    assert [each.id for each in store.summaries("b", 9)] == ["c", "é"]


def test_words_and_vectors_are_fused(store: Store) -> None:
    store.put([entry("words", "the danube", vectors=unit(1, 0)), entry("near", "a stream", vectors=unit(0, 1))])
    toward = np.array([0, 1], np.float32)
    assert found(store, "danube") == [("words", 0)]
    # Second by vector and first by words beats first by vector alone.
    assert found(store, "danube", toward) == [("words", 0), ("near", 0)]
    assert found(store, "brook", toward) == [("near", 0), ("words", 0)]


def test_vectors_follow_what_comes_and_goes(store: Store) -> None:
    toward = np.array([0, 1], np.float32)
    store.put([entry("a", "x", vectors=unit(1, 0)), entry("b", "x", vectors=unit(0.6, 0.8))])
    assert found(store, "y", toward) == [("b", 0), ("a", 0)]
    store.put([entry("c", "x", vectors=unit(0, 1)), entry("a", "x", vectors=unit(0.1, 0.9))])
    store.remove("b")
    assert found(store, "y", toward) == [("c", 0), ("a", 0)]


def test_vectors_count_only_where_every_passage_has_one_of_the_model(store: Store, tmp_path: Path) -> None:
    toward = np.array([0, 1], np.float32)
    store.put([entry("a", "x", vectors=unit(0, 1))])
    store.put([entry("b", "y")])
    assert found(store, "y", toward) == [("b", 0)]
    store.put([entry("b", "y", vectors=unit(1, 0))])
    assert found(store, "z", toward) == [("a", 0), ("b", 0)]
    other = Store(tmp_path / "a.sqlite", "embed:2")
    assert found(other, "z", toward) == []
    other.close()


def test_a_failure_in_the_middle_changes_nothing(store: Store) -> None:
    store.put([entry("a", "river")])
    with pytest.raises(UnicodeEncodeError):
        store.put([entry("a", "sea"), entry("b", "half \ud800 a lake")])
    assert found(store, "river") == [("a", 0)]
    assert found(store, "sea lake") == []


def test_readers_see_one_moment_while_documents_are_put(store: Store) -> None:
    """Every document has two passages with one word; a search never sees one without the other."""
    store.put([entry("0", "river one", "river two")])
    stop = threading.Event()
    failures: list[object] = []

    def read() -> None:
        while not stop.is_set():
            try:
                passages = [passage.document for passage in store.search("river", None, 1000)]
                if any(passages.count(document) != 2 for document in passages):
                    failures.append(passages)
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(40):
        store.put([entry(str(number % 20), "river one", "river two")])
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert store.contents().documents == 20


def test_what_is_no_base_is_said(tmp_path: Path) -> None:
    assert not Store(tmp_path / "none.sqlite", None).exists()
    (tmp_path / "text.sqlite").write_text("no database, however long it is " * 100)
    with pytest.raises(KnowledgeUnavailable, match="not a database"):
        Store(tmp_path / "text.sqlite", None).exists()
    with closing(sqlite3.connect(tmp_path / "later.sqlite")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(KnowledgeUnavailable, match="version 99; this program reads 1"):
        Store(tmp_path / "later.sqlite", None).exists()


def test_nothing_is_written_after_a_base_was_deleted(store: Store, tmp_path: Path) -> None:
    store.put([entry("a", "river")])
    store.delete()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KnowledgeUnavailable, match="deleted"):
        store.put([entry("a", "river")])
    assert list(tmp_path.iterdir()) == []
