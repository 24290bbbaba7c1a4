"""No way round: whatever a single request meets, every endpoint meets that has work done, in every dialect."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.core import Service
from service.engine.types import Item, Overloaded, Ticket
from service.keys import add_key, read_keys
from service.settings import Settings
from tests.service.fakes import build

MESSAGES = [{"role": "user", "content": "good"}]
TRANSLATION = {"q": "good", "source": "en", "target": "de"}
DOCUMENTS = [{"id": "danube", "text": "A river."}]
CLASSIFIER = {"name": "topics", "examples": [{"text": "good", "label": label} for label in "aabb"]}
WORK: dict[str, tuple[str, str, Any]] = {
    "translate": ("POST", "/v1/translate", {"input": "good"}),
    "translate, stream": ("POST", "/v1/translate", {"input": ["good", "bad"], "stream": True}),
    "generate": ("POST", "/v1/generate", {"input": "hello"}),
    "generate, stream": ("POST", "/v1/generate", {"input": "hello", "stream": True}),
    "answer": ("POST", "/v1/answer", {"question": "where?", "context": "paris"}),
    "sentiment": ("POST", "/v1/sentiment", {"input": "good"}),
    "sentiment, list": ("POST", "/v1/sentiment", {"input": ["good", "bad", "fine"]}),
    "classify": ("POST", "/v1/classify", {"classifier": "topics", "input": "good"}),
    "classify, list": ("POST", "/v1/classify", {"classifier": "topics", "input": ["good", "bad"]}),
    "classifier": ("POST", "/v1/classifiers", CLASSIFIER),
    "summarize": ("POST", "/v1/summarize", {"input": "it rains."}),
    "summarize, extractive": ("POST", "/v1/summarize", {"input": "it rains.", "mode": "extractive"}),
    "estimate": ("POST", "/v1/energy/estimate", {"task": "sentiment", "input": "good"}),
    "chat": ("POST", "/v1/chat/completions", {"messages": MESSAGES}),
    "chat, n": ("POST", "/v1/chat/completions", {"messages": MESSAGES, "n": 3}),
    "chat, stream": ("POST", "/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    "chat, another task": ("POST", "/v1/chat/completions", {"messages": MESSAGES, "model": "tiny-translate"}),
    "completions": ("POST", "/v1/completions", {"prompt": ["hello", "good"]}),
    "responses": ("POST", "/v1/responses", {"input": "hello"}),
    "responses, stream": ("POST", "/v1/responses", {"input": "hello", "stream": True}),
    "Hugging Face": ("POST", "/hf/tiny-generate", {"inputs": "hello"}),
    "Hugging Face, list": ("POST", "/hf/tiny-sentiment", {"inputs": ["good", "bad"]}),
    "Hugging Face, stream": ("POST", "/hf/tiny-generate", {"inputs": "hello", "stream": True}),
    "Hugging Face, chat": ("POST", "/hf/tiny-generate/v1/chat/completions", {"messages": MESSAGES}),
    "LibreTranslate": ("POST", "/translate", TRANSLATION),
    "LibreTranslate, list": ("POST", "/translate", {**TRANSLATION, "q": ["good", "bad"]}),
    "LibreTranslate, detected": ("POST", "/translate", {**TRANSLATION, "source": "auto", "q": "the good dog runs"}),
    "detect": ("POST", "/detect", {"q": "the dog runs along the beach"}),
    "documents": ("PUT", "/v1/knowledge/rivers/documents", DOCUMENTS),
    "search": ("POST", "/v1/knowledge/rivers/search", {"query": "river"}),
    "answer from a base": ("POST", "/v1/answer", {"question": "what river?", "knowledge_base": "rivers"}),
}
NO_MODEL = ("/v1/embeddings",)
"""Work that no tiny model here does; it comes by the same door, `Service.run`."""
LIMITS: dict[str, dict[str, Any]] = {
    "requests": {"requests_per_minute": 3},
    "tokens": {"tokens_per_minute": 1},
    "joules": {"daily_budget_j": 1.0},
    "concurrency": {"concurrency": 20},
    "none": {},
}
every_way = pytest.mark.parametrize("way", WORK)
read_by_a_model = pytest.mark.parametrize("way", [way for way in WORK if way != "detect"])
billed = pytest.mark.parametrize("way", [way for way in WORK if way not in ("detect", "estimate")])
"""What the engine or the disk works for, and so what may have to wait."""


@dataclass
class Shop:
    """A service, and its keys: one for each way and limit, so that no test meets what another has used up."""

    client: TestClient
    file: Path
    secrets: dict[str, str]

    @property
    def service(self) -> Service:
        service: Service = self.client.app.state.service  # type: ignore[attr-defined]
        return service

    def ask(self, way: str, limit: str, **headers: str) -> Any:
        """Have work done in a ``way`` with the key that has a ``limit``."""
        method, path, body = WORK[way]
        return self.client.request(method, path, json=body, headers={**self.key(way, limit), **headers})

    def key(self, way: str, limit: str) -> dict[str, str]:
        """The header that brings this key."""
        return {"x-api-key": self.secrets[name_of(way, limit)]}


def name_of(way: str, limit: str) -> str:
    return f"{way}-{limit}".replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def open_shop(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    file, part = folder / "keys.toml", folder / "part.toml"
    # As the command writes them, but all at once.
    lines, secrets = [], {}
    for way in WORK:
        for limit, fields in LIMITS.items():
            secrets[name_of(way, limit)] = add_key(part, name_of(way, limit), fields)
            lines.append(part.read_text())
            part.unlink()
    file.write_text("".join(lines))
    changes = {name: folder / name for name in ("knowledge", "classifiers")}
    changes |= {"api_keys_file": file, "max_concurrent_requests": 64}
    app = create_app(settings.model_copy(update=changes), build)
    with TestClient(app) as client:
        shop = Shop(client, file, secrets)
        assert [shop.ask(way, "none").status_code for way in ("documents", "classifier")] == [200, 200]
        yield shop


@pytest.fixture
def shop(open_shop: Shop) -> Iterator[Shop]:
    yield open_shop
    open_shop.service.engine.holds = False  # type: ignore[attr-defined]
    assert open_shop.service.door.inside == 0


def assert_refused(response: Any, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (429, code), response.text
    seconds, milliseconds = (int(response.headers[name]) for name in ("retry-after", "retry-after-ms"))
    assert 1 <= milliseconds <= 86_400_000
    assert seconds == -(-milliseconds // 1000)


def test_every_way_to_have_work_done_is_here(client: TestClient) -> None:
    """What the OpenAPI document says may be overloaded, but for an administrator's: a new endpoint belongs above."""
    working = set()
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            may_be_overloaded = "`overloaded`" in operation["responses"].get("429", {}).get("description", "")
            if may_be_overloaded and not path.startswith("/v1/models/"):
                working.add((method.upper(), path))
    asked = {(method, path) for method, path, _ in WORK.values()} | {("POST", path) for path in NO_MODEL}
    for method, path in working:
        pattern = path.replace("{model}", "tiny-generate").replace("{name}", "rivers")
        assert (method, pattern) in asked, path
    # And nothing else takes a body, but what is an administrator's.
    bodies = {
        (method.upper(), path)
        for path, methods in client.get("/openapi.json").json()["paths"].items()
        for method in methods
        if method in ("post", "put", "patch") and not path.startswith("/v1/models/")
    }
    assert bodies == working


@every_way
def test_the_rate_of_requests(shop: Shop, way: str) -> None:
    statuses = [shop.ask(way, "requests").status_code for _ in range(4)]
    assert statuses[0] == 200 and statuses[-1] == 429
    assert_refused(shop.ask(way, "requests"), "rate_limit_exceeded")
    assert shop.ask(way, "none").status_code == 200


def test_what_does_no_work_is_a_request_too(shop: Shop) -> None:
    key = shop.key("detect", "requests")
    statuses = {shop.client.get("/v1/energy/live", headers=key).status_code for _ in range(4)}
    assert statuses <= {200, 429}
    assert_refused(shop.client.get("/v1/models", headers=key), "rate_limit_exceeded")
    assert shop.client.get("/livez", headers=key).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "counts"),
    [
        ("/v1/sentiment", {"input": ["good"] * 3}, 3),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 3}, 3),
        ("/v1/completions", {"prompt": ["hello", "good"]}, 2),
        ("/hf/tiny-sentiment", {"inputs": ["good", "bad"]}, 2),
        ("/translate", {**TRANSLATION, "q": ["good", "bad", "fine"]}, 3),
        ("/v1/classifiers", CLASSIFIER, 4),
        ("/v1/knowledge/rivers/documents", [{"id": str(number), "text": "A river."} for number in range(3)], 3),
    ],
)
def test_several_at_once_count_as_several(
    settings: Settings, tmp_path: Path, path: str, body: Any, counts: int
) -> None:
    secret = add_key(tmp_path / "keys.toml", "mine", {"requests_per_minute": 4})
    changed = {name: tmp_path / name for name in ("knowledge", "classifiers")}
    changed["api_keys_file"] = tmp_path / "keys.toml"
    with TestClient(create_app(settings.model_copy(update=changed), build), headers={"x-api-key": secret}) as client:
        method = "PUT" if path.endswith("documents") else "POST"
        assert client.request(method, path, json=body).status_code == 200
        statuses = [client.post("/v1/sentiment", json={"input": "good"}).status_code for _ in range(3)]
        assert statuses == [200] * (4 - counts) + [429] * (counts - 1)


@read_by_a_model
def test_the_rate_of_tokens(shop: Shop, way: str) -> None:
    assert shop.ask(way, "tokens").status_code == 200
    assert_refused(shop.ask(way, "tokens"), "rate_limit_exceeded")
    assert shop.ask(way, "none").status_code == 200


@billed
def test_the_joules_of_a_key(shop: Shop, way: str) -> None:
    # The fake's clock moves a second with every bill: from the morning on, that stays within the day.
    shop.service.account.time_s = time.time() // 86_400 * 86_400  # type: ignore[misc]
    assert shop.ask(way, "joules").status_code == 200
    refused = shop.ask(way, "joules")
    assert_refused(refused, "daily_budget_spent")
    assert f"the key {name_of(way, 'joules')}" in refused.json()["error"]["message"]
    assert shop.ask(way, "none").status_code == 200
    budget = shop.client.get("/v1/energy/live", headers=shop.key(way, "joules")).json()["budget"]
    assert (budget["limit_j"], budget["spent_j"]) == (1.0, 2.0)


@every_way
def test_the_places_of_all_of_a_key_and_of_its_share(shop: Shop, way: str) -> None:
    door, keys = shop.service.door, read_keys(shop.file)
    few, many = (keys[name_of(way, limit)] for limit in ("concurrency", "none"))
    with door.admit(64):
        assert_refused(shop.ask(way, "none"), "overloaded")
    with door.admit(1, tokens=10**9):
        assert_refused(shop.ask(way, "none"), "overloaded")
    with door.admit(20, key=few):
        assert_refused(shop.ask(way, "concurrency"), "too_many_at_once")
        assert shop.ask(way, "none").status_code == 200
    with door.admit(32, key=many):
        assert_refused(shop.ask(way, "none"), "overloaded")
        assert shop.ask(way, "concurrency").status_code == 200
    assert shop.ask(way, "none").status_code == 200


@billed
def test_the_time_that_a_header_allows(shop: Shop, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.service.engine.holds = True  # type: ignore[attr-defined]

    async def slow(*_: Any) -> Any:
        await asyncio.Event().wait()

    # What does not come to the engine waits for the disk.
    monkeypatch.setattr(shop.service.knowledge, "_timed", slow)
    response = shop.ask(way, "none", **{"x-timeout-s": "0.2"})
    # A stream may have begun.
    assert response.status_code in ((200, 504) if "stream" in way else (504,))
    assert "deadline_exceeded" in response.text and "the 0.2 s allowed" in response.text


def test_a_list_longer_than_a_key_may_have_at_once_is_refused_for_good(shop: Shop) -> None:
    for path, body in (
        ("/v1/sentiment", {"input": ["good"] * 21}),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 21}),
    ):
        response = shop.client.post(path, json=body, headers=shop.key("sentiment", "concurrency"))
        assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_value")
        assert "at most 20 are allowed" in response.json()["error"]["message"]


@pytest.mark.parametrize(("limit", "groups"), [("none", [32, 32, 32, 4]), ("concurrency", [20] * 5)])
def test_a_long_classifier_is_made_group_by_group_in_the_places_of_one_list(
    shop: Shop, limit: str, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, door = shop.service.engine, shop.service.door
    seen, submit = [], engine.submit

    def watched(model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        seen.append((len(items), door.inside))
        return submit(model, items, key)

    monkeypatch.setattr(engine, "submit", watched)
    body = {"name": "long", "examples": [{"text": "good", "label": label} for label in "ab" * 50]}
    response = shop.client.post("/v1/classifiers", json=body, headers=shop.key("classifier", limit))
    assert response.status_code == 200, response.text
    assert response.json()["results"][0]["labels"] == {"a": 50, "b": 50}
    assert seen == [(group, groups[0]) for group in groups]
    assert shop.client.delete("/v1/classifiers/long", headers=shop.key("classifier", limit)).status_code == 200


@pytest.mark.parametrize(
    ("body_s", "header", "limit_s"), [(0.1, None, 0.1), (9, "0.1", 0.1), (0.1, "9", 0.1), (999, "999", 0.5)]
)
def test_the_least_time_counts_and_the_services_own_too(
    settings: Settings, body_s: float, header: str | None, limit_s: float
) -> None:
    with TestClient(create_app(settings.model_copy(update={"request_timeout_s": 0.5}), build)) as client:
        client.app.state.service.engine.holds = True  # type: ignore[attr-defined]
        headers = {} if header is None else {"x-timeout-s": header}
        response = client.post("/v1/sentiment", json={"input": "good", "timeout_s": body_s}, headers=headers)
        assert response.status_code == 504
        assert f"the {limit_s:g} s allowed" in response.json()["error"]["message"]


@pytest.mark.parametrize("told", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_that_is_none_is_refused(client: TestClient, told: str) -> None:
    for response in (
        client.post("/v1/sentiment", json={"input": "good"}, headers={"x-timeout-s": told}),
        client.post("/v1/chat/completions", json={"messages": MESSAGES}, headers={"x-timeout-s": told}),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (422, "x-timeout-s")
    for wrong in (0, -1):
        assert client.post("/v1/sentiment", json={"input": "good", "timeout_s": wrong}).status_code == 422


class TestMinute:
    """How a key's minute is counted."""

    @pytest.fixture
    def client(self, settings: Settings, tmp_path: Path) -> Iterator[TestClient]:
        limits = {"requests_per_minute": 4, "tokens_per_minute": 60}
        secret = add_key(tmp_path / "keys.toml", "mine", limits)
        app = create_app(settings.model_copy(update={"api_keys_file": tmp_path / "keys.toml"}), build)
        with TestClient(app, headers={"x-api-key": secret}) as client:
            yield client

    def test_what_is_broken_off_counts_as_if_it_had_been_written(self, client: TestClient) -> None:
        """Or a client could read a stream and leave just before its end, for ever."""
        engine = client.app.state.service.engine  # type: ignore[attr-defined]
        engine.holds = True
        left = client.post("/v1/generate", json={"input": "hi", "max_tokens": 50}, headers={"x-timeout-s": "0.1"})
        assert left.status_code == 504
        engine.holds = False
        assert_refused(client.post("/v1/generate", json={"input": "hi" * 30}), "rate_limit_exceeded")

    def test_what_finds_no_room_is_given_back(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        def submit(*given: Any) -> None:
            raise Overloaded(0.1)

        body = {"input": "hi", "max_tokens": 50}
        with monkeypatch.context() as patch:
            patch.setattr(client.app.state.service.engine, "submit", submit)  # type: ignore[attr-defined]
            assert_refused(client.post("/v1/generate", json=body), "overloaded")
        assert client.post("/v1/generate", json=body).status_code == 200

    def test_what_is_not_written_is_given_back(self, client: TestClient) -> None:
        body = {"input": "hi", "max_tokens": 64, "chat": False}
        assert [client.post("/v1/generate", json=body).status_code for _ in range(2)] == [200, 200]

    def test_a_refused_request_takes_nothing_of_it(self, client: TestClient) -> None:
        def ask(texts: int) -> int:
            return client.post("/v1/sentiment", json={"input": ["a"] * texts}).status_code

        assert [ask(1), ask(1)] == [200, 200]
        # Three are more than the two that are left, however often it is tried.
        assert [ask(3) for _ in range(5)] == [429] * 5
        assert ask(2) == 200
