"""Every task over HTTP, good and bad. A sixth task is covered by its line in the tuple."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from energy.types import Quality
from service.routes.tasks import TaskResponse
from service.tasks import TASKS
from service.tasks.base import Task
from tests.service.fakes import FakeAccount, FakeEngine

AnyTask = Task[Any, Any]


def ask(client: TestClient, task: AnyTask, **changes: Any) -> Any:
    return client.post(f"/v1/{task.name}", json={**task.example, **changes})


every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@every_task
def test_the_example_is_answered_with_its_bill(client: TestClient, account: FakeAccount, task: AnyTask) -> None:
    response = ask(client, task)
    body = response.json()
    assert response.status_code == 200, body
    assert list(body) == ["id", "model", "results", "usage", "timings", "energy"]
    assert body == TaskResponse[task.result].model_validate(body).model_dump(mode="json")  # type: ignore[name-defined]
    assert body["model"] == f"tiny-{task.name}"
    texts = task.example[task.texts]
    assert len(body["results"]) == (len(texts) if isinstance(texts, list) else 1)
    assert body["results"] == [task.result.model_validate(result).model_dump() for result in body["results"]]
    assert body["usage"]["input_tokens"] > 0
    assert body["timings"] == {"queue_ms": 2.0, "compute_ms": 5.0}
    assert body["energy"] == {
        "active_j": 1.5,
        "allocated_j": 2.0,
        "gco2e": 0.25,
        "quality": "measured",
        "settled": True,
    }
    assert response.headers["x-queue-time"] == "2.000"
    assert response.headers["x-inference-time"] == "5.000"
    assert response.headers["x-energy-joules"] == "2.000000"
    assert response.headers["x-energy-gco2e"] == "0.250000000"
    assert response.headers["x-energy-quality"] == "measured"
    assert response.headers["x-request-id"] == body["id"]
    record = account.records[body["id"]].request
    assert (record.task, record.model, record.status) == (task.name, body["model"], "ok")
    assert record.input_tokens == body["usage"]["input_tokens"]


@every_task
def test_an_unknown_bill_is_null_and_never_zero(client: TestClient, account: FakeAccount, task: AnyTask) -> None:
    account.quality = Quality.UNAVAILABLE
    response = ask(client, task)
    energy = response.json()["energy"]
    assert (energy["active_j"], energy["allocated_j"], energy["gco2e"]) == (None, None, None)
    assert not {"x-energy-joules", "x-energy-gco2e"} & set(response.headers)
    assert response.headers["x-energy-quality"] == "unavailable"


WRONG_TEXTS: list[Any] = [
    "",
    " \n\t ",
    [],
    ["good", ""],
    [""],
    3,
    None,
    {"text": "good"},
    ["good", 3],
    [["good"]],
    "half \ud800 a pair",
    ["good"] * 33,
]


@every_task
@pytest.mark.parametrize("wrong", WRONG_TEXTS, ids=repr)
def test_a_wrong_text_is_refused_by_name(client: TestClient, task: AnyTask, wrong: Any) -> None:
    changes = {task.texts: wrong}
    if isinstance(wrong, list) and "context" in task.example:
        changes["context"] = [task.example["context"]] * max(1, len(wrong))
    # json= would refuse a lone surrogate, as a careful client does; a careless one escapes it.
    response = client.post(
        f"/v1/{task.name}",
        content=json.dumps({**task.example, **changes}),
        headers={"content-type": "application/json"},
    )
    error = response.json()["error"]
    assert response.status_code == 422, error
    assert error["param"] == task.texts
    assert error["message"].startswith(f"{task.texts}: ")


@every_task
@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"truncate": "yes"}, "truncate", "invalid_value"),
        ({"model": 3}, "model", "invalid_value"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused_by_name(
    client: TestClient, task: AnyTask, changes: dict[str, Any], param: str, code: str
) -> None:
    response = ask(client, task, **changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, code)


@every_task
def test_a_missing_text_is_named(client: TestClient, task: AnyTask) -> None:
    rest = {name: value for name, value in task.example.items() if name != task.texts}
    response = client.post(f"/v1/{task.name}", json=rest)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, task.texts, "missing_parameter")


@every_task
def test_an_unknown_model_is_answered_with_the_known_ones(client: TestClient, task: AnyTask) -> None:
    response = ask(client, task, model="nobody")
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert "nobody" in error["message"]
    assert f"tiny-{task.name}" in error["message"]


@every_task
@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b'{"input": "\\u12"}', 400),
        (b'{"a":' * 100_000, 400),
        (b"9" * 10_000, 400),
        (b"[]", 422),
        (b"null", 422),
        (b'"text"', 422),
        (b"NaN", 422),
    ],
    ids=lambda part: repr(part)[:24],
)
def test_a_malformed_body_is_a_clear_error(client: TestClient, task: AnyTask, content: bytes, status: int) -> None:
    response = client.post(f"/v1/{task.name}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@every_task
def test_a_body_of_another_type_is_told_what_to_send(client: TestClient, task: AnyTask) -> None:
    response = client.post(f"/v1/{task.name}", content=b"input=good")
    assert response.status_code == 400
    assert "content-type: application/json" in response.json()["error"]["message"]


@every_task
def test_nan_becomes_null(client: TestClient, engine: FakeEngine, task: AnyTask) -> None:
    engine.logit = float("nan")
    response = ask(client, task)
    assert response.status_code == 200
    assert "NaN" not in response.text


@every_task
def test_what_callers_type_never_becomes_a_control_token(
    client: TestClient, engine: FakeEngine, task: AnyTask
) -> None:
    specials = {token for token in range(5)}
    plain = ask(client, task, **{task.texts: "good"})
    before = [token for token in engine.items[-1].input_ids if token in specials]
    control = ask(client, task, **{task.texts: "good [SEP] [CLS] <|assistant|> <|end|> [EOS]"})
    after = [token for token in engine.items[-1].input_ids if token in specials]
    assert (plain.status_code, control.status_code) == (200, 200)
    assert before == after


@every_task
def test_a_long_text_is_refused_with_the_limit_or_read_in_windows(client: TestClient, task: AnyTask) -> None:
    response = ask(client, task, **{task.texts: "good bad fine " * 100})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, task.texts, "too_many_tokens")
    assert '"truncate": true' in error["message"]
    assert ask(client, task, **{task.texts: "good bad fine " * 100}, truncate=True).status_code == 200


def test_a_list_is_answered_in_its_order(client: TestClient) -> None:
    texts = ["good", "bad bad", "fine fine fine"]
    results = client.post("/v1/sentiment", json={"input": texts}).json()["results"]
    assert [result["label"] for result in results] == ["positive", "negative", "neutral"]
