"""Texts told while they are written: whole letters, no half stop texts, one bill, a free row when nobody listens."""

import asyncio
import json
import re
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tokenizers import Tokenizer

from service.app import create_app
from service.core import Service
from service.engine.types import EngineClosed, Overloaded
from service.routes import sse
from service.settings import STARTERS, Settings
from service.streaming import PlainTranscript, cut_at_stop
from service.tasks import TASKS
from service.tasks.base import Task
from tests.service.fakes import FakeAccount, FakeEngine, build, byte_tokenizer, wait_until, word_tokenizer
from tests.service.test_edge import call
from tests.tiny import tiny_tokenizer

BYTES = byte_tokenizer()
TOKENIZERS = {
    "bytes": BYTES,
    "words": word_tokenizer("$A"),
    "unigram": tiny_tokenizer(),
    **{folder.name: Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in sorted(STARTERS.iterdir())},
}
WRITERS = [task for task in TASKS if "stream" in task.request.model_fields]
every_writer = pytest.mark.parametrize("task", WRITERS, ids=lambda task: task.name)


def events(response: Any) -> list[dict[str, Any]]:
    """What the stream told, comments left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = [chunk for chunk in response.text.split("\n\n") if chunk and not chunk.startswith(":")]
    assert all(chunk.startswith("data: ") and "\n" not in chunk for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def stream(client: TestClient, task: Task[Any, Any], **changes: Any) -> Any:
    return client.post(f"/v1/{task.name}", json={**task.example, **changes, "stream": True})


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(data=st.data())
def test_pieces_are_the_beginning_of_the_text_whatever_tokens_come(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    transcript = PlainTranscript(tokenizer)
    pieces = [transcript.read(token) for token in ids]
    assert tokenizer.decode(ids).startswith("".join(pieces))


@given(st.text("ab😀é ", max_size=30), st.lists(st.text("ab😀é ", min_size=1, max_size=6), max_size=4))
def test_no_piece_holds_half_a_letter_or_half_a_stop_text(text: str, stop: list[str]) -> None:
    ids = BYTES.encode(text, add_special_tokens=False).ids
    whole = cut_at_stop(text, stop)
    transcript, told = PlainTranscript(BYTES, stop), ""
    for token in ids:
        told += transcript.read(token)
        assert whole.startswith(told)
    # What is held back at the end may still become a stop text.
    assert whole == told or any(each.startswith(whole[len(told) :]) for each in stop)


def test_a_text_is_told_as_soon_as_it_is_certain() -> None:
    ids = BYTES.encode("so 😀 end", add_special_tokens=False).ids
    transcript = PlainTranscript(BYTES, ["enough"])
    assert [transcript.read(token) for token in ids] == ["s", "o", " ", "", "", "", "😀", " ", "", "", "end"]


@every_writer
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_pieces_are_the_texts_and_the_last_event_the_whole_answer(
    client: TestClient, account: FakeAccount, task: Task[Any, Any], several: bool
) -> None:
    text = task.example["input"]
    changes = {"input": [text, "good dog", "fine city"]} if several else {}
    *pieces, last = events(stream(client, task, **changes))
    plain = client.post(f"/v1/{task.name}", json={**task.example, **changes}).json()
    assert last == plain | {"id": last["id"]}
    assert last["energy"]["allocated_j"] == 2.0
    assert [set(piece) for piece in pieces] == [{"index", "delta"}] * len(pieces)
    told = ["".join(piece["delta"] for piece in pieces if piece["index"] == n) for n in range(len(last["results"]))]
    assert told == [result["text"] for result in last["results"]]
    assert all(piece["delta"] for piece in pieces)
    record = account.records[last["id"]].request
    assert (record.status, record.output_tokens) == ("ok", last["usage"]["output_tokens"])


def test_texts_written_by_a_plain_search_come_token_by_token(client: TestClient, engine: FakeEngine) -> None:
    engine.writes = tuple(BYTES.encode("one two", add_special_tokens=False).ids)
    *pieces, last = events(client.post("/v1/generate", json={"input": "a", "stream": True, "stop": "wo"}))
    assert [piece["delta"] for piece in pieces] == ["o", "n", "e", " ", "t"]
    assert last["results"] == [{"text": "one t", "finish_reason": "stop"}]


@every_writer
@pytest.mark.parametrize(
    ("refusal", "status"), [(Overloaded(2.4), 429), (EngineClosed("draining"), 503), (RuntimeError("broken"), 500)]
)
def test_what_is_refused_has_the_status_of_a_single_answer(
    client: TestClient, engine: FakeEngine, task: Task[Any, Any], refusal: Exception, status: int
) -> None:
    engine.refusal = refusal
    response = stream(client, task)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@every_writer
@pytest.mark.parametrize(
    ("changes", "status"), [({"model": "nobody"}, 404), ({"input": ""}, 422), ({"input": ["good"] * 33}, 422)], ids=str
)
def test_a_wrong_request_is_refused_as_ever(
    client: TestClient, task: Task[Any, Any], changes: dict[str, Any], status: int
) -> None:
    assert stream(client, task, **changes).status_code == status


@pytest.mark.parametrize("path", ["answer", "sentiment"])
def test_tasks_that_write_nothing_do_not_stream(client: TestClient, path: str) -> None:
    example = next(task.example for task in TASKS if task.name == path)
    assert client.post(f"/v1/{path}", json={**example, "stream": True}).status_code == 422


def test_a_failure_inside_a_stream_is_its_last_event(
    client: TestClient, engine: FakeEngine, account: FakeAccount, caplog: pytest.LogCaptureFixture
) -> None:
    engine.breaks = True
    first, last = events(client.post("/v1/generate", json={"input": "good", "chat": False, "stream": True}))
    assert first == {"index": 0, "delta": "g"}
    assert last["error"]["code"] == "internal_error"
    assert "broken" not in last["error"]["message"] and "broken" in caplog.text
    assert [record.request.status for record in account.records.values()] == ["failed"]


def test_a_stream_over_its_time_says_so(settings: Settings) -> None:
    hasty = settings.model_copy(update={"request_timeout_s": 0.05})
    with TestClient(create_app(hasty, build)) as client:
        service = client.app.state.service
        service.engine.holds = True
        (last,) = events(client.post("/v1/translate", json={"input": "good", "stream": True}))
        assert last["error"]["code"] == "deadline_exceeded"
        assert all(ticket.future.cancelled() for ticket in service.engine.tickets)
        assert [record.request.status for record in service.account.records.values()] == ["timed_out"]


def test_silence_is_filled_with_comments(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.01)
    engine.holds = True
    sent: list[dict[str, Any]] = []

    async def until_kept_alive() -> None:
        while [message.get("body") for message in sent].count(b": keep-alive\n\n") < 2:
            await asyncio.sleep(0.001)

    asyncio.run(call(client.app, path="/v1/generate", body=STREAMED, then=until_kept_alive, sent=sent))


STREAMED = b'{"input": "good", "stream": true}'


def test_a_listener_that_leaves_frees_its_row(client: TestClient, engine: FakeEngine, account: FakeAccount) -> None:
    engine.holds = True

    async def until_submitted() -> None:
        while not engine.tickets:
            await asyncio.sleep(0.001)

    asyncio.run(call(client.app, path="/v1/generate", body=STREAMED, then=until_submitted))
    assert [ticket.future.cancelled() for ticket in engine.tickets] == [True]
    assert [record.request.status for record in account.records.values()] == ["cancelled"]
    assert client.app.state.service.door.inside == 0


def test_streams_and_single_requests_share_the_door(settings: Settings) -> None:
    narrow = settings.model_copy(update={"max_concurrent_requests": 3, "max_client_batch_size": 3})
    with TestClient(create_app(narrow, build)) as client:
        service = client.app.state.service
        service.engine.holds = True
        refused: list[Any] = []

        async def until_full() -> None:
            while not service.engine.tickets:
                await asyncio.sleep(0.001)
            body = {"input": ["good"] * 3, "stream": True}
            refused.append(await asyncio.to_thread(client.post, "/v1/generate", json=body))

        asyncio.run(call(client.app, path="/v1/generate", body=STREAMED, then=until_full))
        assert refused[0].status_code == 429
        assert refused[0].json()["error"]["code"] == "overloaded"


def test_over_a_socket_the_metrics_show_who_has_left(service: Service, address: str) -> None:
    service.engine.holds = True
    with httpx.Client(base_url=address) as client:

        def left() -> float:
            pattern = r'^wattle_request_count_total{model="tiny-generate",status="cancelled".*} (\S+)$'
            return sum(map(float, re.findall(pattern, client.get("/metrics").text, re.MULTILINE)))

        before = left()
        with client.stream("POST", "/v1/generate", json={"input": "good", "stream": True}) as response:
            assert response.headers["x-request-id"].startswith("req-")
            assert "wattle_queue_size 1.0" in client.get("/metrics").text
        wait_until(lambda: left() == before + 1)
        assert "wattle_queue_size 0.0" in client.get("/metrics").text


def test_streams_are_in_the_openapi_document(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    streaming = {
        path for path in paths if "text/event-stream" in str(paths[path]["post" if "post" in paths[path] else "get"])
    }
    assert streaming >= {f"/v1/{task.name}" for task in WRITERS}
    assert not streaming & {"/v1/answer", "/v1/sentiment"}


def test_a_client_that_never_reads_does_not_keep_its_stream(
    client: TestClient, account: FakeAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.05)

    async def deaf(scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            await send(message)
            await asyncio.Event().wait()

        await client.app(scope, receive, told)

    sent = asyncio.run(asyncio.wait_for(call(deaf, path="/v1/generate", body=STREAMED), 5))
    assert [message["type"] for message in sent] == ["http.response.start"]
    # What it asked for is done and billed.
    assert [record.request.status for record in account.records.values()] == ["ok"]
    assert client.app.state.service.door.inside == 0
