"""Bases are made, described and deleted by name; what they cost is on the bill; killed, they hold whole documents."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from energy.types import Phase, Step
from service.errors import InvalidValue, KnowledgeBaseNotFound
from service.knowledge.bases import Knowledge, find_embedder
from service.knowledge.documents import Document
from service.knowledge.ingest import EMBED_PASSAGES, Progress
from service.knowledge.store import Passage
from service.models import Model, Models
from tests.service.knowledge.fakes import EmbeddingEngine, embedder_of

ROOT = Path(__file__).parents[3]


class Opened:
    """Knowledge bases, and what they have recorded."""

    def __init__(self, folder: Path, model: Model, embedder: Model | None, max_documents: int = 100) -> None:
        self.steps: list[Step] = []
        self.engine = EmbeddingEngine(model)
        self.bases = Knowledge(folder, max_documents, self.engine, embedder, self.steps.append)

    def put(self, name: str, *documents: Document, request_id: str = "req-1") -> list[Progress]:
        async def put() -> list[Progress]:
            return [step async for step in self.bases.ingest(name, documents, request_id)]

        return asyncio.run(put())

    def search(self, name: str, question: str, passages: int = 5, request_id: str = "req-2") -> list[Passage]:
        (found,) = asyncio.run(self.bases.search(name, [question], passages, request_id))
        return found


Open = Callable[..., Opened]


@pytest.fixture
def opened(tmp_path: Path, models: dict[str, Model]) -> Open:
    def open_bases(embedder: Model | None = None, **options: int) -> Opened:
        return Opened(tmp_path / "bases", models["sentiment"], embedder, **options)

    return open_bases


def test_a_base_is_made_described_and_deleted(opened: Open) -> None:
    ours = opened()
    assert ours.bases.describe_all() == []
    assert ours.put("b.2", Document("a", "Paris is big.")) == [Progress(1, 1, 1, 0)]
    ours.put("a-1", Document("a", "A dog."), Document("b", "It rains."))
    described = ours.bases.describe_all()
    assert [(each.name, each.documents, each.passages, each.retrieval) for each in described] == [
        ("a-1", 2, 2, "bm25"),
        ("b.2", 1, 1, "bm25"),
    ]
    assert described[0].size_bytes > 0 and described[0].embedding_model is None
    ours.bases.delete("a-1")
    for gone in ("a-1", "../b.2", "B.2", ""):
        with pytest.raises(KnowledgeBaseNotFound):
            ours.bases.describe(gone)
    assert ours.search("b.2", "paris")[0].document == "a"
    ours.put("a-1", Document("c", "Back again."))
    assert ours.search("a-1", "dog") == []


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", ".a", "a" * 65, "ä", "a b", "a\n"])
def test_a_name_that_cannot_be_a_files_is_refused(opened: Open, name: str) -> None:
    with pytest.raises(InvalidValue, match="64 at most"):
        opened().put(name, Document("a", "A"))


def test_a_full_base_takes_nothing_more_and_still_replaces(opened: Open) -> None:
    ours = opened(max_documents=2)
    ours.put("a", Document("1", "One."), Document("2", "Two."))
    with pytest.raises(InvalidValue, match="would hold 3; at most 2"):
        ours.put("a", Document("2", "Two!"), Document("3", "Three."))
    assert ours.put("a", Document("2", "Zwei."))[-1].replaced == 1
    with pytest.raises(InvalidValue, match="would hold 3"):
        ours.put("new", *(Document(str(number), "x") for number in range(3)))
    assert [base.name for base in ours.bases.describe_all()] == ["a"]


def test_a_damaged_base_does_not_hide_the_others(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = opened()
    ours.put("good", Document("a", "Paris."))
    (tmp_path / "bases" / "bad.sqlite").write_bytes(b"x" * 10_000)
    (tmp_path / "bases" / "empty.sqlite").touch()
    assert [base.name for base in ours.bases.describe_all()] == ["good"]
    assert "bad.sqlite" in caplog.text


def test_searching_and_indexing_are_steps_of_their_request(opened: Open) -> None:
    ours = opened()
    ours.put("a", Document("1", "Paris is big."), request_id="req-put")
    ours.search("a", "paris", request_id="req-ask")
    billed = [(*step.work.request_ids, step.work.phase) for step in ours.steps if step.work]
    assert set(billed[:-1]) == {("req-put", Phase.INDEX)}
    assert billed[-1] == ("req-ask", Phase.RETRIEVE)
    assert all(step.ended_ns > step.started_ns and step.cpu_ns >= 0 and step.model == "bm25" for step in ours.steps)


def test_an_embedding_model_finds_what_shares_no_word(opened: Open, models: dict[str, Model]) -> None:
    ours = opened(embedder_of(models["sentiment"]))
    ours.put("a", Document("city", "Paris."), Document("animal", "The dog runs."), Document("weather", "It rains."))
    base = ours.bases.describe("a")
    assert (base.retrieval, base.embedding_model) == ("bm25+dense", "tiny-embed")
    assert ours.search("a", "capital of france", passages=1)[0].document == "city"
    assert ours.search("a", "river", passages=1, request_id="req-ask")[0].document == "weather"
    # The question's own embedding is on its request's bill, as an item of the engine.
    assert ours.engine.items[-1].request_id == "req-ask"


def test_vectors_outlive_the_process_and_their_model_only(opened: Open, models: dict[str, Model]) -> None:
    first = embedder_of(models["sentiment"])
    opened(first).put("a", Document("city", "Paris."), Document("animal", "The dog runs."))
    assert opened(first).search("a", "capital", passages=1)[0].document == "city"
    for embedder in (None, embedder_of(models["sentiment"], revision="2")):
        later = opened(embedder)
        assert later.bases.describe("a").retrieval == "bm25"
        assert later.search("a", "capital") == []
        assert later.search("a", "dog")[0].document == "animal"
        # Nobody pays for the vector of a question that nothing can be compared with.
        assert later.engine.items == []


def test_embedding_shows_its_progress_and_waits_for_a_full_queue(opened: Open, models: dict[str, Model]) -> None:
    ours = opened(embedder_of(models["sentiment"]))
    ours.engine.refusals = 3
    text = "A sentence about paris and the river, and then some. " * 1000
    steps = ours.put("a", Document("long", text), Document("short", "Paris."))
    passages = [step.passages for step in steps]
    assert passages == sorted(passages) and passages[0] == EMBED_PASSAGES and passages[-1] == len(ours.engine.items)
    assert [step.documents for step in steps[:-1]] == sorted(step.documents for step in steps[:-1])
    assert (steps[0].documents, steps[-1].documents) == (0, 2)


def test_a_text_that_the_model_cannot_read_is_embedded_all_the_same(opened: Open, models: dict[str, Model]) -> None:
    ours = opened(embedder_of(models["sentiment"]))
    ours.put("a", Document("empty", "\u0301\u0301"), Document("long", "paris " * 190))
    assert ours.bases.describe("a").retrieval == "bm25+dense"
    limit = models["sentiment"].manifest.max_input_tokens
    assert [len(item.input_ids) for item in ours.engine.items] == [2, limit]


def test_the_first_embedding_model_is_the_default(models: dict[str, Model]) -> None:
    assert find_embedder(Models(models)) is None
    embedder = embedder_of(models["sentiment"])
    assert find_embedder(Models({**models, "tiny-embed": embedder})) is embedder


KILLED = """
import asyncio, sys
from pathlib import Path
from service.knowledge.bases import Knowledge
from service.knowledge.documents import Document

async def put():
    bases = Knowledge(Path(sys.argv[1]), 10**6, None, None, lambda step: None)
    for round in range(10**6):
        # Batches of a hundred documents, of three passages each.
        documents = [Document(str(n), f"round {round} water " + "and so on it flows. " * 150) for n in range(100)]
        async for step in bases.ingest("a", documents, "req-1"):
            print(round, step.documents, flush=True)

asyncio.run(put())
"""


def test_a_killed_process_leaves_whole_documents(opened: Open, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "bases")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        round_number, stored = map(int, line.split())
        # In the middle of replacing what is there.
        if round_number == 1 and stored >= 60:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    ours = opened()
    base = ours.bases.describe("a")
    assert (base.documents, base.passages) == (100, 300)
    assert {each.passages for each in ours.bases.documents("a", "", 1000)} == {3}
    rounds = {number: ours.bases.document("a", str(number)).text.split()[1] for number in range(100)}
    assert set(rounds.values()) <= {"0", "1", "2"} and len(set(rounds.values())) > 1
    # The index knows the same documents as the table.
    found = {passage.document for passage in ours.search("a", "water", passages=100)}
    assert found == set(map(str, range(100)))
    assert all(ours.search("a", f"round {value}") for value in set(rounds.values()))
    ours.put("a", Document("0", "Written again."))
    assert ours.search("a", "written")[0].document == "0"
