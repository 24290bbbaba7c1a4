"""One table decides what every error looks like, and the OpenAPI document says the same."""

from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from energy.ledger import LedgerUnreadable
from service.engine.types import EngineClosed, EngineFailed, Overloaded
from service.errors import (
    TABLE,
    AdminOnly,
    ClassifierModelGone,
    ClassifierNotFound,
    ClassifierUnavailable,
    DocumentNotFound,
    InvalidValue,
    MethodNotAllowed,
    ModelInUse,
    ModelRefused,
    RecordNotFound,
    RouteNotFound,
    WattleError,
    render,
)
from service.gate import is_public
from service.tasks import TASKS
from tests.service.fakes import FakeEngine


def error_of(response: Any) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert all(value is None or isinstance(value, str) for value in body["error"].values())
    assert body["error"]["message"]
    return body["error"]


def subclasses(kind: type[Exception]) -> set[type[Exception]]:
    return {kind} | {each for child in kind.__subclasses__() for each in subclasses(child)}


def test_the_table_knows_every_error() -> None:
    others = {Overloaded, EngineClosed, EngineFailed, LedgerUnreadable, Exception}
    assert {*subclasses(WattleError), *others} == {*TABLE, WattleError}


def test_every_code_is_of_one_error() -> None:
    codes = [answer.code for answer in TABLE.values()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_openapi_documents_every_error_that_a_task_can_answer(client: TestClient, task: Any) -> None:
    """All of the table, except what is no answer of a task's own route."""
    responses = client.get("/openapi.json").json()["paths"][f"/v1/{task.name}"]["post"]["responses"]
    elsewhere = {RouteNotFound, MethodNotAllowed, RecordNotFound, LedgerUnreadable, DocumentNotFound}
    elsewhere |= {AdminOnly, ModelInUse, ModelRefused}
    elsewhere |= {ClassifierNotFound, ClassifierModelGone, ClassifierUnavailable}
    expected = {(str(answer.status), answer.code) for kind, answer in TABLE.items() if kind not in elsewhere}
    documented = {
        (status, code.strip("`"))
        for status, response in responses.items()
        if status != "200"
        for code in response["description"].split(" or ")
    }
    assert documented == expected
    for status, response in responses.items():
        if status != "200":
            assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorBody"}


def test_every_operation_documents_its_errors(client: TestClient) -> None:
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            failures = {status for status in operation["responses"] if not status.startswith("2")}
            # Whatever reads a body may find it malformed, whatever computes may be overloaded.
            expected = {"500"} | ({"400", "413", "422"} if method == "post" else set())
            computes = method == "post" and not path.startswith("/v1/models/") and path != "/detect"
            expected |= {"404", "429", "503", "504"} if computes else set()
            # What every request meets before its route does.
            expected |= {"400", "413", "422", "431"} | (set() if is_public(path) else {"401", "429"})
            assert failures >= expected, path
            if method == "post":
                assert "`overloaded`" in operation["responses"]["429"]["description"], path
                assert "`too_many_at_once`" in operation["responses"]["429"]["description"], path
            assert {"operationId", "summary"} <= operation.keys()


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("POST", "/v1/sentiment/", 404, "route_not_found"),
        ("GET", "/v1/sentiment", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/v1/energy/requests/req-0", 404, "request_not_found"),
        ("GET", "/v1/energy/requests/..%2f..%2fetc%2fpasswd", 404, "route_not_found"),
    ],
)
def test_paths_and_methods_answer_in_the_same_shape(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_a_wrong_method_says_which_are_right(client: TestClient) -> None:
    assert client.get("/v1/sentiment").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [(Overloaded(2.4), 429, "overloaded"), (EngineClosed("draining"), 503, "draining")],
)
def test_the_engines_refusals_become_statuses(
    client: TestClient, engine: FakeEngine, refusal: Exception, status: int, code: str
) -> None:
    engine.refusal = refusal
    response = client.post("/v1/sentiment", json={"input": "good"})
    assert (response.status_code, error_of(response)["code"]) == (status, code)


def test_overload_says_when_to_come_back(client: TestClient, engine: FakeEngine) -> None:
    engine.refusal = Overloaded(2.4)
    headers = client.post("/v1/sentiment", json={"input": "good"}).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2400")


def test_what_nobody_foresaw_tells_the_client_nothing(
    client: TestClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.failure = RuntimeError("cannot open /home/somebody/model.onnx")
    response = client.post("/v1/sentiment", json={"input": "good"}, headers={"x-request-id": "mine-1"})
    error = error_of(response)
    assert (response.status_code, error["code"], error["type"]) == (500, "internal_error", "server_error")
    assert response.headers["x-request-id"] == "mine-1"
    assert "somebody" not in response.text and "Traceback" not in response.text
    assert "/home/somebody/model.onnx" in caplog.text and "mine-1" in caplog.text


def test_a_message_may_quote_what_is_no_unicode() -> None:
    assert b"there is no" in render(InvalidValue("half \ud800 a pair", "there is no such parameter")).body


def test_another_frameworks_refusal_keeps_its_shape() -> None:
    response = render(HTTPException(418))
    assert (response.status_code, b"internal_error" in response.body) == (500, True)
