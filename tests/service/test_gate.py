"""Who may pass, and what they may see: over every route that there is, and one that nobody has thought of."""

import base64
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import openai
import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from libretranslatepy import LibreTranslateAPI
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from service.app import create_app
from service.gate import PAGES
from service.keys import add_key
from service.settings import Settings
from tests.service.conftest import on_a_socket
from tests.service.fakes import FakeAccount, FakeEngine, build

OPEN = {"/", "/livez", "/readyz", "/languages", "/frontend/settings", "/readyz/x"}
HELLO = {"input": "hello"}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The keys of a file, by name, and the file under the name ``file``."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    holders: dict[str, dict[str, bool]] = {"alice": {}, "bob": {}, "admin": {"admin": True}}
    return {name: add_key(path, name, limits) for name, limits in holders.items()} | {"file": str(path)}


@pytest.fixture(scope="module")
def guarded(settings: Settings, secrets: dict[str, str]) -> FastAPI:
    return create_app(settings.model_copy(update={"api_keys_file": Path(secrets["file"])}), build)


@pytest.fixture(scope="module")
def guarded_address(settings: Settings, secrets: dict[str, str]) -> Iterator[str]:
    """Another such service on a real socket."""
    app = create_app(settings.model_copy(update={"api_keys_file": Path(secrets["file"])}), build)
    with on_a_socket(app) as address:
        yield address


@pytest.fixture
def client(guarded: FastAPI) -> Iterator[TestClient]:
    with TestClient(guarded, follow_redirects=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def routes(app: Any) -> list[tuple[str, str]]:
    """Every method and path, with something in the place of what varies."""
    found = []
    for context in app.router.iter_routes() if hasattr(app.router, "iter_routes") else _flat(app.routes):
        if isinstance(context, Route):
            path = re.sub(r"{(\w+)(:\w+)?}", "x", context.path)
            found += [(method, path) for method in sorted(context.methods or ())]
    return found


def _flat(nested: Any) -> Iterator[Any]:
    for each in nested:
        inner = getattr(each, "routes", None) or getattr(getattr(each, "original_router", None), "routes", None)
        yield from _flat(inner) if inner else [each]


def test_every_route_but_the_public_ones_needs_a_key(client: TestClient, engine: FakeEngine) -> None:
    walked = routes(client.app)
    assert {"/v1/translate", "/hf/x", "/translate", "/metrics", "/openapi.json", "/dashboard/page.js"} <= {
        path for _, path in walked
    }
    for headers in ({}, bearer("wattle-wrong"), {"x-api-key": "wrong"}, {"authorization": "Bearer"}):
        for method, path in walked:
            response = client.request(method, path, headers=headers)
            if path in OPEN:
                assert response.status_code in (200, 307, 404), path
            else:
                assert response.status_code == 401, (method, path)
                challenges = response.headers.get_list("www-authenticate")
                assert challenges == ['Bearer realm="wattle"', 'Basic realm="wattle"']
                if method != "HEAD":
                    error = response.json()["error"]
                    assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    assert engine.items == []


def test_a_route_that_nobody_thought_of_is_guarded(settings: Settings, secrets: dict[str, str]) -> None:
    app = create_app(settings.model_copy(update={"api_keys_file": Path(secrets["file"])}), build)
    app.add_api_route("/brand/new", lambda: {"made": "yesterday"})
    with TestClient(app) as client:
        assert client.get("/brand/new").status_code == 401
        assert client.get("/nowhere").status_code == 401
        assert client.get("/brand/new", headers=bearer(secrets["bob"])).json() == {"made": "yesterday"}
        document = client.get("/openapi.json", headers=bearer(secrets["bob"])).json()
        assert {"401", "429", "431"} <= document["paths"]["/brand/new"]["get"]["responses"].keys()


def test_a_web_socket_is_closed(settings: Settings) -> None:
    app = create_app(settings, build)

    @app.websocket("/socket")
    async def socket(each: WebSocket) -> None:
        await each.accept()

    with TestClient(app) as client, pytest.raises(WebSocketDisconnect), client.websocket_connect("/socket"):
        raise AssertionError("let in")


@pytest.mark.parametrize("path", ["//livez", "/livez/", "/LIVEZ", "/livez/../metrics", "/dashboardx", "/docs/"])
def test_what_looks_like_a_public_path_is_none(client: TestClient, path: str) -> None:
    assert client.get(f"http://testserver{path}").status_code == 401


def test_a_setting_opens_pages(settings: Settings, secrets: dict[str, str]) -> None:
    for page in PAGES:
        changed = {"api_keys_file": Path(secrets["file"]), "public_pages": (page,)}
        with TestClient(create_app(settings.model_copy(update=changed), build)) as client:
            for other, theirs in PAGES.items():
                for path in theirs:
                    expected = 200 if other == page else 401
                    assert client.get(path.replace("board/", "board/page.js")).status_code == expected, path
            assert client.get("/v1/energy/live").status_code == 401
    assert Settings(public_pages="docs, metrics").public_pages == ("docs", "metrics")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="public_pages"):
        Settings(public_pages="v1")  # type: ignore[arg-type]


def test_the_ways_to_bring_a_key(client: TestClient, secrets: dict[str, str]) -> None:
    secret = secrets["alice"]
    basic = {"authorization": "Basic " + base64.b64encode(f"anyone:{secret}".encode()).decode()}
    for headers in (bearer(secret), {"x-api-key": secret}, {"authorization": f"bearer  {secret} "}, basic):
        assert client.post("/v1/sentiment", json={"input": "good"}, headers=headers).status_code == 200
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 401), ("cross-site", 401)):
        # A browser sends it by itself, whoever wrote the page that asks.
        asked = client.post("/v1/sentiment", json={"input": "good"}, headers={**basic, "sec-fetch-site": site})
        assert asked.status_code == status
    for broken in ("Basic", "Basic é", "Basic !!!", "Basic YQ==", "Digest x", ""):
        headers = {"authorization": broken.encode()}
        assert client.get("/v1/energy", headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/translate", "/detect"])
def test_libretranslates_key_stands_in_the_body(client: TestClient, secrets: dict[str, str], path: str) -> None:
    body = {"q": "the dog runs along the beach", "source": "en", "target": "de"}
    for key, status in ((secrets["alice"], 200), ("wrong", 401), ("", 401), (None, 401), (["x"], 401)):
        assert client.post(path, json={**body, "api_key": key}).status_code == status
    assert client.post(path, data={**body, "api_key": secrets["alice"]}).status_code == 200
    assert client.post(path, data={**body, "api_key": "wrong"}).status_code == 401
    for broken in (b"{", b"[]", b"\xff", b"[" * 50):
        headers = {"content-type": "application/json"}
        assert client.post(path, content=broken, headers=headers).status_code == 401
    # Elsewhere a body says nothing of who asks.
    assert client.post("/v1/sentiment", json={"input": "good", "api_key": secrets["alice"]}).status_code == 401
    assert client.get("/frontend/settings").json()["keyRequired"] is True


def test_an_administrators_path_is_no_other_keys(client: TestClient, secrets: dict[str, str]) -> None:
    for method, path in (("POST", "/v1/models/load"), ("DELETE", "/v1/models/x"), ("PUT", "/v1/models/x/y")):
        response = client.request(method, path, headers=bearer(secrets["bob"]))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_only")
        assert client.request(method, path, headers=bearer(secrets["admin"])).status_code != 403
    assert client.get("/v1/models/tiny-answer", headers=bearer(secrets["bob"])).status_code == 200


def test_a_body_is_not_read_for_who_may_not_enter(settings: Settings, secrets: dict[str, str]) -> None:
    small = {"api_keys_file": Path(secrets["file"]), "max_body_bytes": 50}
    with TestClient(create_app(settings.model_copy(update=small), build)) as client:
        large = {"input": "good " * 100}
        assert client.post("/v1/sentiment", json=large).status_code == 401
        assert client.post("/v1/sentiment", json=large, headers=bearer(secrets["bob"])).status_code == 413


class TestClients:
    """Clients that others wrote, over a real socket."""

    def test_openais(self, guarded_address: str, secrets: dict[str, str]) -> None:
        messages: Any = [{"role": "user", "content": "hello"}]
        with openai.OpenAI(base_url=f"{guarded_address}/v1", api_key=secrets["alice"], max_retries=0) as client:
            answer = client.chat.completions.create(model="tiny-generate", messages=messages)
            assert answer.choices[0].message.content
            pieces = client.chat.completions.create(model="tiny-generate", messages=messages, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
            with pytest.raises(openai.PermissionDeniedError):
                client.post("/models/load", body={"model": "x"}, cast_to=object)
        with openai.OpenAI(base_url=f"{guarded_address}/v1", api_key="wattle-wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"

    def test_hugging_faces(self, guarded_address: str, secrets: dict[str, str]) -> None:
        url = f"{guarded_address}/hf/tiny-sentiment"
        assert InferenceClient(url, token=secrets["alice"]).text_classification("good")[0].label == "positive"
        with pytest.raises(HfHubHTTPError, match="401"):
            InferenceClient(url, token="wrong").text_classification("good")

    def test_libretranslates(self, guarded_address: str, secrets: dict[str, str]) -> None:
        assert LibreTranslateAPI(guarded_address, secrets["alice"]).translate("good", "en", "de") == "good"
        assert LibreTranslateAPI(guarded_address).languages()
        with pytest.raises(HTTPError, match="401"):
            LibreTranslateAPI(guarded_address).translate("good", "en", "de")


class TestBills:
    @pytest.fixture(autouse=True)
    def asked(self, client: TestClient, secrets: dict[str, str]) -> dict[str, str]:
        """A request by each of two keys; their ids."""
        ids = {}
        for name in ("alice", "bob"):
            answer = client.post("/v1/sentiment", json={"input": "good"}, headers=bearer(secrets[name]))
            ids[name] = answer.json()["id"]
        return ids

    def test_a_key_sees_its_own_and_an_administrator_all(
        self, client: TestClient, secrets: dict[str, str], asked: dict[str, str]
    ) -> None:
        for viewer, seen in (("alice", {"alice"}), ("bob", {"bob"}), ("admin", {"alice", "bob"})):
            headers = bearer(secrets[viewer])
            for name, request_id in asked.items():
                found = client.get(f"/v1/energy/requests/{request_id}", headers=headers)
                assert found.status_code == (200 if name in seen else 404)
                if found.status_code == 200:
                    assert found.json()["key"] == name
            latest = client.get("/v1/energy/requests", headers=headers).json()["requests"]
            assert {each["key"] for each in latest} == seen
            live = client.get("/v1/energy/live", headers=headers).json()
            assert {each["id"] for each in live["recent"]} == {asked[name] for name in seen}
            assert live["tasks"]["sentiment"]["requests"] == sum(live["tasks"]["sentiment"]["counts"]) == len(seen)
            # Of the machine, as the balance of its meters is.
            assert (live["moments"] is not None) == (viewer == "admin")

    def test_the_sums_by_key(self, client: TestClient, secrets: dict[str, str]) -> None:
        service = client.app.state.service  # type: ignore[attr-defined]
        service.ledger._flush()  # no need to wait for the second that it gathers
        for viewer, seen in (("alice", ["alice"]), ("admin", ["alice", "bob"])):
            query = {"by": "key", "since": "2000-01-01"}
            report = client.get("/v1/energy", params=query, headers=bearer(secrets[viewer])).json()
            assert [group["name"] for group in report["groups"]] == seen
            assert report["total"]["requests"] == len(seen)
            assert bool(report["meters"]) == (viewer == "admin")

    def test_a_key_is_told_by_its_name_alone(
        self, client: TestClient, account: FakeAccount, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        client.app.state.service.engine.failure = RuntimeError("broken")  # type: ignore[attr-defined]
        with caplog.at_level(logging.DEBUG):
            client.post("/v1/sentiment", json={"input": "good"}, headers=bearer(secrets["bob"]))
        assert "of bob failed" in caplog.text
        everything = caplog.text + repr(account.records)
        everything += client.get("/metrics", headers=bearer(secrets["admin"])).text
        assert not [name for name, secret in secrets.items() if name != "file" and secret in everything]


def test_the_openapi_document_tells_of_keys(client: TestClient, secrets: dict[str, str]) -> None:
    document = client.get("/openapi.json", headers=bearer(secrets["bob"])).json()
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            public = path.replace("{model}", "x") in OPEN
            assert ("security" in operation) != public, path
            unauthorised = operation["responses"].get("401", {}).get("description", "")
            assert ("`invalid_api_key`" in unauthorised) != public


class TestOrigins:
    def test_none_may_call_unless_named(self, client: TestClient, secrets: dict[str, str]) -> None:
        headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
        assert client.options("/v1/sentiment", headers=headers).status_code == 401
        asked = client.post("/v1/sentiment", json={"input": "good"}, headers={**headers, **bearer(secrets["bob"])})
        assert not [name for name in asked.headers if name.startswith("access-control")]

    def test_those_named_may(self, settings: Settings, secrets: dict[str, str]) -> None:
        changed = {"api_keys_file": Path(secrets["file"]), "cors_origins": ("https://example.org",)}
        with TestClient(create_app(settings.model_copy(update=changed), build)) as client:
            wanted = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
            asks = {"access-control-request-method": "POST", "access-control-request-headers": wanted}
            for origin, allowed in (("https://example.org", True), ("https://example.com", False)):
                before = client.options("/v1/sentiment", headers={"origin": origin, **asks})
                assert (before.status_code == 200) == allowed
                # A browser shows its page an error too only where the page may read it.
                refused = client.post("/v1/sentiment", json={"input": "good"}, headers={"origin": origin})
                assert refused.status_code == 401
                assert (refused.headers.get("access-control-allow-origin") == origin) == allowed
                assert "access-control-allow-credentials" not in refused.headers
