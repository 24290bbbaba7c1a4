"""Knowledge bases over HTTP: documents in, progress and the bill out, passages and answers from them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.errors import KnowledgeUnavailable
from service.knowledge.documents import Document
from service.knowledge.store import Store
from tests.service.fakes import FakeAccount, FakeEngine

JSON_LINES = {"content-type": "application/jsonl"}
RIVERS = [
    {"id": "france", "text": "The capital of France is Paris. It lies on a river.", "metadata": {"page": 3}},
    {"id": "weather", "text": "It rains. The rain in the city is good."},
    {"id": "beach", "text": "A dog runs along the beach."},
]


@pytest.fixture
def base(client: TestClient) -> Any:
    """The address of a base that holds ``RIVERS``."""
    assert client.put("/v1/knowledge/rivers/documents", json=RIVERS).status_code == 200
    yield "/v1/knowledge/rivers"
    client.delete("/v1/knowledge/rivers")


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def test_documents_are_answered_with_progress_and_the_bill(
    client: TestClient, account: FakeAccount, base: str
) -> None:
    body = "\n".join(json.dumps(each) for each in [*RIVERS, {"id": "new", "text": "good " * 30_000}])
    response = client.put(f"{base}/documents", content=body, headers=JSON_LINES)
    assert response.headers["content-type"] == "application/x-ndjson"
    *steps, last = map(json.loads, response.text.splitlines())
    assert [(step["documents"], step["of"], step["replaced"]) for step in steps] == [(3, 4, 3), (4, 4, 3)]
    assert (last["documents"], last["knowledge_base"]) == (4, "rivers")
    assert (last["energy"]["allocated_j"], last["energy"]["quality"]) == (2.0, "measured")
    record = account.records[last["id"]].request
    assert (record.task, record.model, record.status) == ("ingest", "bm25", "ok")
    assert {name for step in account.steps[-3:] for name in step.work.request_ids} == {last["id"]}


def test_bases_and_documents_are_listed_shown_and_deleted(client: TestClient, base: str) -> None:
    (listed,) = client.get("/v1/knowledge").json()["knowledge_bases"]
    assert listed == client.get(base).json()
    assert (listed["name"], listed["documents"], listed["passages"]) == ("rivers", 3, 3)
    assert (listed["retrieval"], listed["embedding_model"]) == ("bm25", None)
    page = client.get(f"{base}/documents", params={"limit": 2}).json()
    assert [each["id"] for each in page["documents"]] == ["beach", "france"]
    rest = client.get(f"{base}/documents", params={"limit": 2, "after": page["next"]}).json()
    assert rest == {"documents": [{"id": "weather", "characters": 39, "passages": 1}], "next": None}
    assert client.get(f"{base}/documents/france").json() == RIVERS[0]
    assert client.delete(f"{base}/documents/france").json() == {"deleted": "france"}
    assert error_of(client.get(f"{base}/documents/france"))["code"] == "document_not_found"
    assert error_of(client.delete(f"{base}/documents/france"))["code"] == "document_not_found"
    assert client.delete(base).json() == {"deleted": "rivers"}
    for response in (client.get(base), client.delete(base), client.get(f"{base}/documents")):
        assert (response.status_code, error_of(response)["code"]) == (404, "knowledge_base_not_found")


def test_metadata_may_hold_any_number(client: TestClient, base: str) -> None:
    large = {"id": "large", "text": "The capital of France is Paris.", "metadata": {"number": [2**70, -(2**63), 0.5]}}
    client.put(f"{base}/documents", json=[large])
    assert client.get(f"{base}/documents/large").json() == large
    client.delete(f"{base}/documents/france")
    answer = client.post("/v1/answer", json={"question": "what is the capital?", "knowledge_base": "rivers"})
    assert answer.json()["results"][0]["passages"][0]["metadata"] == large["metadata"]


def test_an_id_may_be_a_path(client: TestClient, base: str) -> None:
    headers = {"content-type": "text/markdown; charset=utf-8"}
    client.put(f"{base}/documents", params={"id": "docs/a b?.md"}, content="# Good\n", headers=headers)
    assert client.get(f"{base}/documents/docs/a%20b%3F.md").json()["text"] == "# Good\n"


@pytest.mark.parametrize(
    ("content", "headers", "status", "param", "said"),
    [
        (b"{", JSON_LINES, 400, None, "line 1"),
        (b"", JSON_LINES, 422, "documents", "holds none"),
        (b'{"id": "a", "text": "A"}\n{"id": "b"}', JSON_LINES, 422, "text", "line 2 ('b')"),
        (b"text", {"content-type": "text/plain"}, 422, "id", "?id=NAME"),
        (b"text", {}, 400, None, "content-type"),
        (b"x" * 3_000_000, JSON_LINES, 413, None, "larger"),
    ],
)
def test_wrong_documents_change_nothing(
    client: TestClient, content: bytes, headers: dict[str, str], status: int, param: str | None, said: str
) -> None:
    response = client.put("/v1/knowledge/new/documents", content=content, headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert said in error_of(response)["message"]
    assert client.get("/v1/knowledge/new").status_code == 404


def test_a_wrong_name_or_page_is_refused_by_name(client: TestClient, base: str) -> None:
    response = client.put("/v1/knowledge/Rivers/documents", json=RIVERS)
    assert (response.status_code, error_of(response)["param"]) == (422, "name")
    response = client.get(f"{base}/documents", params={"limit": 0})
    assert (response.status_code, error_of(response)["param"]) == (422, "limit")


def test_a_failure_in_the_middle_is_the_last_line(
    client: TestClient, account: FakeAccount, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = Store.put, iter(range(9))

    def full(self: Store, entries: Any) -> int:
        if next(calls):
            raise KnowledgeUnavailable("database or disk is full")
        return put(self, entries)

    monkeypatch.setattr(Store, "put", full)
    documents = [{"id": str(number), "text": "good " * 20_000} for number in range(3)]
    first, last = map(json.loads, client.put(f"{base}/documents", json=documents).text.splitlines())
    assert (first["documents"], first["of"]) == (1, 3)
    assert last["error"]["code"] == "knowledge_unavailable" and "disk is full" in last["error"]["message"]
    assert [record.request.status for record in account.records.values()] == ["ok", "failed"]
    assert client.get(base).json()["documents"] == 4


def test_who_stops_in_between_keeps_what_is_stored(client: TestClient, account: FakeAccount, base: str) -> None:
    documents = [Document(str(number), "good " * 20_000) for number in range(3)]

    async def stop_after_the_first() -> None:
        steps = client.app.state.service.ingest("rivers", documents, "req-stopped")  # type: ignore[attr-defined]
        await anext(steps)
        await steps.aclose()

    asyncio.run(stop_after_the_first())
    assert account.records["req-stopped"].request.status == "cancelled"
    assert client.get(base).json()["documents"] == 4


def test_a_search_has_its_bill(client: TestClient, account: FakeAccount, base: str) -> None:
    response = client.post(f"{base}/search", json={"query": "When does it rain?", "passages": 1})
    body = response.json()
    (passage,) = body["passages"]
    assert passage["text"] == RIVERS[1]["text"] and passage["score"] == pytest.approx(1 / 61)
    assert (passage["document"], passage["start"], passage["end"]) == ("weather", 0, 39)
    assert response.headers["x-energy-joules"] == "2.000000"
    record = account.records[body["id"]].request
    assert (record.task, record.status) == ("search", "ok")
    assert client.post(f"{base}/search", json={"query": "nobody said this"}).json()["passages"] == []
    for wrong, param in (({}, "query"), ({"query": "a", "passages": 0}, "passages"), ({"query": "a", "k": 1}, "k")):
        assert error_of(client.post(f"{base}/search", json=wrong))["param"] == param
    response = client.post("/v1/knowledge/nothing/search", json={"query": "a"})
    assert (response.status_code, error_of(response)["code"]) == (404, "knowledge_base_not_found")


def test_an_answer_names_its_document_and_place(
    client: TestClient, engine: FakeEngine, account: FakeAccount, base: str
) -> None:
    body = {"question": "What is the capital of France, and where is the city?", "knowledge_base": "rivers"}
    response = client.post("/v1/answer", json=body)
    (result,) = response.json()["results"]
    text = RIVERS[0]["text"]
    assert (result["answer"], result["document"], result["abstained"]) == ("Paris", "france", False)
    assert text[result["start"] : result["end"]] == "Paris"
    assert result["confidence"] is None  # the tiny model was never calibrated
    assert [passage["document"] for passage in result["passages"]] == ["france", "weather"]
    assert result["passages"][0]["metadata"] == {"page": 3}
    # Both passages were read in one go, and search and reading are on one bill.
    request_id = response.json()["id"]
    assert [item.request_id for item in engine.items] == [request_id] * 2
    assert account.steps[-1].work.request_ids == [request_id]


def test_one_passage_may_be_enough(client: TestClient, engine: FakeEngine, base: str) -> None:
    body = {"question": ["capital of France?", "rain?"], "knowledge_base": "rivers", "passages": 1}
    results = client.post("/v1/answer", json=body).json()["results"]
    assert [result["answer"] for result in results] == ["Paris", ""]
    assert [len(result["passages"]) for result in results] == [1, 1]
    assert len(engine.items) == 2


def test_where_nothing_is_found_nothing_is_read(client: TestClient, engine: FakeEngine, base: str) -> None:
    body = {"question": "xylophone?", "knowledge_base": "rivers", "abstain": False}
    (result,) = client.post("/v1/answer", json=body).json()["results"]
    assert (result["answer"], result["abstained"], result["passages"]) == ("", True, [])
    assert engine.items == []


def test_an_answer_wants_one_source(client: TestClient, account: FakeAccount) -> None:
    for body, param, code in (
        ({}, "context", "missing_parameter"),
        ({"context": "paris", "knowledge_base": "rivers"}, "knowledge_base", "invalid_value"),
        ({"knowledge_base": "rivers", "passages": 21}, "passages", "invalid_value"),
        ({"knowledge_base": "nothing"}, "knowledge_base", "knowledge_base_not_found"),
        ({"knowledge_base": "../rivers"}, "knowledge_base", "knowledge_base_not_found"),
    ):
        error = error_of(client.post("/v1/answer", json={"question": "what?", **body}))
        assert (error["param"], error["code"]) == (param, code)
    assert {record.request.status for record in account.records.values()} == {"refused"}


def test_no_answer_tells_where_bases_lie(client: TestClient, base: str, settings: Any) -> None:
    folder = settings.knowledge
    (Path(folder) / "broken.sqlite").write_bytes(b"x" * 5000)
    response = client.get("/v1/knowledge/broken")
    assert (response.status_code, error_of(response)["code"]) == (503, "knowledge_unavailable")
    assert str(folder) not in response.text
    assert [each["name"] for each in client.get("/v1/knowledge").json()["knowledge_bases"]] == ["rivers"]
    (Path(folder) / "broken.sqlite").unlink()


def test_the_docs_show_how_to_put(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "/v1/knowledge/{name}/documents&#39; -X PUT" in page and "-X DELETE" in page
