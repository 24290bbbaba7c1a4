"""Ids, body limits and the ways of a client that leaves or waits too long."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.app import create_app
from service.edge import nesting
from service.settings import Settings
from tests.service.fakes import FakeAccount, FakeEngine, build, wait_until

BODY = b'{"input": "good"}'
JSON = [(b"host", b"test"), (b"content-type", b"application/json")]


def post(
    client: TestClient, content: bytes | Any, headers: dict[str, str] | None = None, path: str = "/v1/sentiment"
) -> Any:
    return client.post(path, content=content, headers={"content-type": "application/json", **(headers or {})})


@pytest.mark.parametrize("sane", ["a", "req-1", "4bf92f35-77b3.4da6:a_b", "x" * 128])
def test_a_callers_own_id_is_echoed(client: TestClient, account: FakeAccount, sane: str) -> None:
    first, second = (post(client, BODY, {"x-request-id": sane}) for _ in range(2))
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == sane
    assert first.json()["id"] != second.json()["id"]
    assert set(account.records) == {first.json()["id"], second.json()["id"]}


@pytest.mark.parametrize("odd", ["", " ", "a b", "x" * 129, "a\tb", "<script>", "é"])
def test_an_odd_id_is_replaced(client: TestClient, odd: str) -> None:
    response = client.post("/v1/sentiment", json={"input": "good"}, headers={"x-request-id": odd.encode()})
    assert response.headers["x-request-id"] == response.json()["id"]


@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/metrics"])
def test_every_answer_has_an_id(client: TestClient, path: str) -> None:
    assert client.get(path).headers["x-request-id"].startswith("req-")


@pytest.fixture
def small(settings: Settings) -> Any:
    with TestClient(create_app(settings.model_copy(update={"max_body_bytes": len(BODY)}), build)) as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/sentiment", "/nowhere", "/livez"])
def test_a_body_over_the_limit_is_refused(small: TestClient, path: str) -> None:
    assert post(small, BODY).status_code == 200
    response = post(small, BODY + b" ", path=path)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"
    assert f"{len(BODY)} bytes" in response.json()["error"]["message"]


def test_a_body_without_a_length_is_counted_as_it_comes(small: TestClient) -> None:
    def endless() -> Any:
        for _ in range(1000):
            yield b" " * 10

    assert post(small, endless()).status_code == 413
    assert post(small, iter([BODY[:5], BODY[5:]])).status_code == 200


@pytest.mark.parametrize("length", ["-1", "x", "9" * 5000])
def test_a_length_that_is_no_number_does_no_harm(small: TestClient, length: str) -> None:
    sent = asyncio.run(call(small.app, headers=[*JSON, (b"content-length", length.encode())]))
    assert sent[0]["status"] == (413 if length.isdecimal() else 200)


async def call(
    app: Any,
    *,
    path: str = "/v1/sentiment",
    body: bytes = BODY,
    headers: list[tuple[bytes, bytes]] = JSON,
    then: Callable[[], Any] | None = None,
    sent: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One request by hand; ``then`` is awaited before the client disconnects, ``sent`` filled meanwhile."""
    sent = [] if sent is None else sent

    async def messages() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": body, "more_body": False}
        await (then() if then else asyncio.Event().wait())
        while True:
            yield {"type": "http.disconnect"}

    channel = messages()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    await app(scope, channel.__anext__, send)
    return sent


def test_a_client_that_leaves_frees_its_items(client: TestClient, engine: FakeEngine, account: FakeAccount) -> None:
    engine.holds = True

    async def until_submitted() -> None:
        while not engine.tickets:
            await asyncio.sleep(0.001)

    sent = asyncio.run(call(client.app, then=until_submitted))
    assert sent[0]["status"] == 499
    assert [ticket.future.cancelled() for ticket in engine.tickets] == [True]
    assert [record.request.status for record in account.records.values()] == ["cancelled"]
    assert client.app.state.service.door.inside == 0


def test_a_client_that_leaves_within_its_body_gets_nothing(client: TestClient) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/v1/sentiment", "headers": JSON}
    asyncio.run(client.app(scope, gone, send))


def test_a_request_over_its_time_is_told_so_and_frees_its_items(settings: Settings) -> None:
    hasty = settings.model_copy(update={"request_timeout_s": 0.05})
    with TestClient(create_app(hasty, build)) as client:
        service = client.app.state.service
        service.engine.holds = True
        response = client.post("/v1/sentiment", json={"input": ["good", "bad"]})
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: all(ticket.future.cancelled() for ticket in service.engine.tickets))
        assert [record.request.status for record in service.account.records.values()] == ["timed_out"]


def test_one_failed_item_frees_the_others(client: TestClient, engine: FakeEngine, account: FakeAccount) -> None:
    engine.holds = True
    original = engine.submit

    def submit(model: str, items: Any, key: str) -> Any:
        tickets = original(model, items, key)
        tickets[0].future.set_exception(RuntimeError("broken"))
        return tickets

    engine.submit = submit  # type: ignore[method-assign]
    response = client.post("/v1/sentiment", json={"input": ["good", "bad"]})
    assert response.status_code == 500
    assert engine.tickets[1].future.cancelled()
    assert [record.request.status for record in account.records.values()] == ["failed"]


def test_the_door_counts_the_texts_of_a_list(settings: Settings) -> None:
    narrow = settings.model_copy(update={"max_concurrent_requests": 3, "max_client_batch_size": 3})
    with TestClient(create_app(narrow, build)) as client:
        service = client.app.state.service
        service.engine.holds = True

        async def until_full() -> None:
            while not service.engine.tickets:
                await asyncio.sleep(0.001)
            refused.append(await asyncio.to_thread(client.post, "/v1/sentiment", json={"input": ["good"] * 3}))

        refused: list[Any] = []
        asyncio.run(call(client.app, then=until_full))
        assert refused[0].status_code == 429
        assert int(refused[0].headers["retry-after"]) >= 1
        service.engine.holds = False
        assert client.post("/v1/sentiment", json={"input": ["good"] * 3}).status_code == 200


def test_headers_and_address_over_the_limit_are_refused(client: TestClient) -> None:
    for response in (
        client.post("/v1/sentiment", json={"input": "good"}, headers={"x-more": "x" * 17_000}),
        client.get("/readyz", headers={f"x-{number}": "x" * 100 for number in range(170)}),
        client.get("/v1/energy", params={"since": "1" * 17_000}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("path", ["/v1/sentiment", "/translate", "/v1/chat/completions", "/v1/energy/estimate"])
def test_json_that_is_nested_too_deeply_is_refused(client: TestClient, path: str) -> None:
    for deep in (b"[" * 65, b'{"a": ' * 65 + b"1" + b"}" * 65, b"[" * 1_000_000, b'[[{"x":' * 250_000):
        response = post(client, deep, path=path)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")
        assert "deeper than the 64 levels" in response.json()["error"]["message"]
    for shallow in (b'{"input": "' + b"[{" * 5000 + b'"}', b'{"input": ["\\"[[", "' + b"\\\\" * 99 + b'"]}'):
        assert "levels" not in post(client, shallow, path=path).text


JSON_TEXT = st.recursive(
    st.one_of(st.none(), st.text(alphabet='[]{}"\\a', max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text('[{"', max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON_TEXT)
def test_nesting_is_counted_as_a_parser_would(value: Any) -> None:
    def depth(part: Any) -> int:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return int(isinstance(part, dict | list)) + max(map(depth, inner), default=0)

    assert nesting(json.dumps(value).encode(), 0) == depth(value)


@given(st.binary(max_size=40), st.text(alphabet='[]{}"\\', max_size=40))
def test_nesting_never_fails(noise: bytes, marks: str) -> None:
    assert nesting(noise + marks.encode(), 0) >= 0


@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/docs", "/dashboard", "/v1/models"])
def test_head_is_answered_as_get_is(client: TestClient, path: str) -> None:
    head, whole = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (whole.status_code, whole.headers["content-type"])


@pytest.mark.parametrize("hosts", [0, 2])
def test_a_request_names_one_host(client: TestClient, hosts: int) -> None:
    sent = asyncio.run(call(client.app, headers=[(b"host", b"test")] * hosts + JSON[1:]))
    assert sent[0]["status"] == 400
    assert b"the header host" in sent[1]["body"]


def test_a_body_that_is_packed_is_refused_by_name(client: TestClient) -> None:
    response = post(client, gzip.compress(BODY), {"content-encoding": "gzip"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")
    assert "content-encoding gzip" in response.json()["error"]["message"]
    assert post(client, BODY, {"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/docs", "/dashboard", "/dashboard/page.js", "/v1/models"])
def test_every_answer_says_what_a_browser_may_do_with_it(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "unsafe" not in policy
