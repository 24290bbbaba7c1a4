"""Classifiers over HTTP: made, asked, listed, deleted; billed as any task; made anew where their model has changed."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from models.heads import fit
from service.engine.types import Item, Overloaded, Ticket
from service.models import Model
from service.tasks.classify import MAX_EXAMPLES, MAX_LABELS, Classify, Make
from tests.service.fakes import FakeAccount, FakeEngine

EXAMPLES = [
    {"text": "A good dog runs.", "label": "animal"},
    {"text": "The dog runs along the beach.", "label": "animal"},
    {"text": "Paris is the capital of France.", "label": "place"},
    {"text": "The city lies on a river.", "label": "place"},
]


@pytest.fixture
def made(client: TestClient) -> Iterator[Any]:
    """The answer to making the classifier ``topics``."""
    response = client.post("/v1/classifiers", json={"name": "topics", "examples": EXAMPLES})
    assert response.status_code == 200, response.text
    yield response
    client.delete("/v1/classifiers/topics")


def classify(client: TestClient, texts: Any = "The dog runs.", **changes: Any) -> Any:
    return client.post("/v1/classify", json={"classifier": "topics", "input": texts, **changes})


def error_of(response: Any) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def test_making_one_is_answered_and_billed_as_a_task_is(
    client: TestClient, account: FakeAccount, engine: FakeEngine, made: Any
) -> None:
    body = made.json()
    assert list(body) == ["id", "model", "results", "usage", "timings", "energy"]
    (result,) = body["results"]
    assert (result["classifier"], result["labels"]) == ("topics", {"animal": 2, "place": 2})
    assert 0 <= result["accuracy"] <= 1
    assert made.headers["x-energy-joules"] == "2.000000"
    assert made.headers["x-request-id"] == body["id"]
    settled = account.records[body["id"]]
    assert (settled.request.task, settled.request.model, settled.request.status) == (Make.name, "tiny-sentiment", "ok")
    assert settled.request.input_tokens == sum(len(item.input_ids) for item in engine.items) > 0
    bill = client.get(f"/v1/energy/requests/{body['id']}").json()
    assert bill["energy"]["allocated_j"] == 2.0
    assert f'task="{Make.name}"' in client.get("/metrics").text


def test_a_list_is_classified_in_its_order_with_its_bill(client: TestClient, account: FakeAccount, made: Any) -> None:
    response = classify(client, ["The dog runs.", "France is the city."])
    body = response.json()
    assert [result["label"] for result in body["results"]] == ["animal", "place"]
    for result in body["results"]:
        assert result["scores"].keys() == {"animal", "place"}
        assert result["score"] == max(result["scores"].values()) > 0.5
        assert sum(result["scores"].values()) == pytest.approx(1)
    assert (body["model"], body["energy"]["allocated_j"]) == ("tiny-sentiment", 2.0)
    assert response.headers["x-inference-time"] == "5.000"
    record = account.records[body["id"]].request
    assert (record.task, record.model, record.status) == (Classify.name, "tiny-sentiment", "ok")
    assert len(classify(client).json()["results"]) == 1


def test_classifiers_are_listed_shown_and_deleted(client: TestClient, made: Any) -> None:
    (listed,) = client.get("/v1/classifiers").json()["classifiers"]
    shown = client.get("/v1/classifiers/topics").json()
    assert shown == {**listed, "examples": EXAMPLES}
    assert (listed["classifier"], listed["model"], listed["revision"]) == ("topics", "tiny-sentiment", "1")
    assert listed["current"] is True and listed["created_at"].startswith("20")
    assert client.delete("/v1/classifiers/topics").json() == {"deleted": "topics"}
    gone = [client.get("/v1/classifiers/topics"), client.delete("/v1/classifiers/topics"), classify(client)]
    for response in gone:
        assert (response.status_code, error_of(response)["code"]) == (404, "classifier_not_found")
        assert "GET /v1/classifiers" in error_of(response)["message"]


def test_one_outlives_a_restart(app: FastAPI, made: Any) -> None:
    with TestClient(app) as later:
        assert classify(later).json()["results"][0]["label"] == "animal"


def test_one_is_replaced(client: TestClient, made: Any) -> None:
    renamed = [{**each, "label": each["label"].upper()} for each in EXAMPLES]
    assert client.post("/v1/classifiers", json={"name": "topics", "examples": renamed}).status_code == 200
    assert classify(client).json()["results"][0]["label"] == "ANIMAL"
    assert len(client.get("/v1/classifiers").json()["classifiers"]) == 1


def test_two_makers_of_one_name_leave_one_whole(client: TestClient, made: Any) -> None:
    def make(label: str) -> int:
        examples = [{**each, "label": each["label"] + label} for each in EXAMPLES]
        return client.post("/v1/classifiers", json={"name": "topics", "examples": examples}).status_code

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(make, "ABABABAB")) == {200}
    labels = client.get("/v1/classifiers/topics").json()["labels"]
    assert labels in ({"animalA": 2, "placeA": 2}, {"animalB": 2, "placeB": 2})


def changed(model: Model, **manifest: Any) -> Model:
    return dataclasses.replace(model, manifest=model.manifest.model_copy(update=manifest))


def test_one_whose_model_has_changed_is_made_anew_on_the_same_bill(
    client: TestClient, engine: FakeEngine, account: FakeAccount, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_the_loop(*given: Any) -> Any:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return fit(*given)

    monkeypatch.setattr("service.tasks.classify.fit", off_the_loop)
    classifiers = client.app.state.service.classifiers
    of_another = dataclasses.replace(classifiers.find("topics"), fingerprint="tiny-sentiment:0", revision="0")
    classifiers.put(of_another)
    before = client.get("/v1/classifiers/topics").json()
    assert (before["current"], before["revision"]) == (False, "0")
    engine.items.clear()
    body = classify(client).json()
    assert body["results"][0]["label"] == "animal"
    assert len(engine.items) == 1 + len(EXAMPLES)
    assert body["usage"]["input_tokens"] == sum(len(item.input_ids) for item in engine.items)
    after = client.get("/v1/classifiers/topics").json()
    assert (after["current"], after["revision"], after["created_at"]) == (True, "1", before["created_at"])
    engine.items.clear()
    classify(client)
    assert len(engine.items) == 1


def test_the_examples_of_one_that_is_made_anew_are_computed_in_groups_and_timed_as_a_whole(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, submit = [], engine.submit

    def slow(model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        sizes.append(len(items))
        time.sleep(0.01)
        return submit(model, items, key)

    classifiers = client.app.state.service.classifiers
    client.post("/v1/classifiers", json={"name": "topics", "examples": EXAMPLES * 10})
    classifiers.put(dataclasses.replace(classifiers.find("topics"), fingerprint="tiny-sentiment:0"))
    monkeypatch.setattr(engine, "submit", slow)
    timings = classify(client).json()["timings"]
    assert sizes == [32, 9]
    # What an item of the second group had to wait for is time of the request.
    assert (timings["queue_ms"], timings["compute_ms"] > 15) == (2, True)
    assert client.delete("/v1/classifiers/topics").status_code == 200


def test_one_whose_model_is_gone_says_how_to_make_it_anew(client: TestClient, made: Any) -> None:
    served = client.app.state.service.models.served
    for without in (None, changed(served["tiny-sentiment"], config=served["tiny-answer"].manifest.config)):
        del served["tiny-sentiment"]
        if without is not None:
            served["tiny-sentiment"] = without
        response = classify(client)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (409, "classifier_model_gone", "classifier")
        assert "tiny-sentiment" in error["message"] and "anew" in error["message"]
        served["tiny-sentiment"] = without or served["tiny-answer"]


def test_without_a_model_that_gives_vectors_none_can_be_made(client: TestClient) -> None:
    service = client.app.state.service
    del service.models.served["tiny-sentiment"]
    response = client.post("/v1/classifiers", json={"name": "topics", "examples": EXAMPLES})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_a_model_may_be_named(client: TestClient, made: Any) -> None:
    assert classify(client, model="tiny-sentiment").status_code == 200
    response = classify(client, model="tiny-answer")
    assert (response.status_code, error_of(response)["param"]) == (422, "model")
    assert "made on tiny-sentiment" in error_of(response)["message"]
    response = classify(client, model="nobody")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    body = {"name": "topics", "examples": EXAMPLES}
    response = client.post("/v1/classifiers", json={**body, "model": "tiny-answer"})
    assert (response.status_code, error_of(response)["param"]) == (422, "model")
    assert client.post("/v1/classifiers", json={**body, "model": "tiny-sentiment"}).status_code == 200


TEXT = EXAMPLES[0]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "Topics"}, "name", "made of a to z"),
    ({"name": "../topics"}, "name", "made of a to z"),
    ({"name": "a" * 65}, "name", "64 characters at most"),
    ({"name": 3}, "name", ""),
    ({"examples": "good"}, "examples", "list"),
    ({"examples": []}, "examples", "not 0"),
    ({"examples": EXAMPLES[:2]}, "examples", "not 1"),
    ({"examples": EXAMPLES[:3]}, "examples", "'place' needs at least 2"),
    ({"examples": [*EXAMPLES, "good"]}, "examples", "number 5"),
    ({"examples": [*EXAMPLES, {"text": "good"}]}, "examples", "number 5"),
    ({"examples": [{**TEXT, "colour": "red"}, *EXAMPLES]}, "examples", "number 1"),
    ({"examples": [*EXAMPLES, {**TEXT, "text": " "}]}, "examples", "text of example number 5"),
    ({"examples": [*EXAMPLES, {**TEXT, "text": 3}]}, "examples", "text of example number 5"),
    ({"examples": [*EXAMPLES, {**TEXT, "label": ""}]}, "examples", "label of example number 5"),
    ({"examples": [*EXAMPLES, {**TEXT, "label": "half \ud800"}]}, "examples", "label of example number 5"),
    ({"examples": [*EXAMPLES, {**TEXT, "label": "a" * 65}]}, "examples", "more than 64 characters"),
    ({"examples": [TEXT] * (MAX_EXAMPLES + 1)}, "examples", f"at most {MAX_EXAMPLES}"),
    ({"examples": [{**TEXT, "label": str(n // 2)} for n in range(2 * MAX_LABELS + 2)]}, "examples", "not 65"),
    ({"examples": [*EXAMPLES, {**TEXT, "text": "good " * 200}]}, "examples[4].text", "200 tokens"),
    ({"colour": "red"}, "colour", "no such parameter"),
]


@pytest.mark.parametrize(("changes", "param", "said"), WRONG, ids=lambda part: repr(part)[:40])
def test_a_wrong_request_is_refused_by_name_and_changes_nothing(
    client: TestClient, changes: dict[str, Any], param: str, said: str
) -> None:
    response = client.post(
        "/v1/classifiers",
        content=json.dumps({"name": "topics", "examples": EXAMPLES, **changes}),
        headers={"content-type": "application/json"},
    )
    error = error_of(response)
    assert (response.status_code, error["param"]) == (422, param), error
    assert said in error["message"]
    assert client.get("/v1/classifiers").json() == {"classifiers": []}


def test_a_long_example_is_cut_on_demand(client: TestClient, made: Any) -> None:
    examples = [*EXAMPLES, {"text": "good " * 200, "label": "place"}]
    response = client.post("/v1/classifiers", json={"name": "topics", "examples": examples, "truncate": True})
    assert response.json()["results"][0]["labels"] == {"animal": 2, "place": 3}


@pytest.mark.parametrize("missing", ["name", "examples"])
def test_what_is_missing_is_named(client: TestClient, missing: str) -> None:
    body = {"name": "topics", "examples": EXAMPLES}
    del body[missing]
    response = client.post("/v1/classifiers", json=body)
    assert (response.status_code, error_of(response)["code"]) == (422, "missing_parameter")
    assert error_of(response)["param"] == missing


@pytest.mark.parametrize("wrong", ["", [], ["good", ""], 3, ["good"] * 33])
def test_a_wrong_text_is_refused(client: TestClient, made: Any, wrong: Any) -> None:
    response = classify(client, wrong)
    assert (response.status_code, error_of(response)["param"]) == (422, "input")


def test_overload_is_told_and_keeps_what_was_there(client: TestClient, engine: FakeEngine, made: Any) -> None:
    engine.refusal = Overloaded(2.4)
    renamed = [{**each, "label": each["label"].upper()} for each in EXAMPLES]
    response = client.post("/v1/classifiers", json={"name": "topics", "examples": renamed})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert classify(client).status_code == 429
    engine.refusal = None
    assert classify(client).json()["results"][0]["label"] == "animal"


def test_a_damaged_file_is_503_until_it_is_made_anew(client: TestClient, made: Any) -> None:
    folder = client.app.state.service.classifiers._folder
    (folder / "topics.json").write_text("{}")
    for response in (classify(client), client.get("/v1/classifiers/topics")):
        assert (response.status_code, error_of(response)["code"]) == (503, "classifier_unavailable")
        assert str(folder) not in response.text
    assert client.post("/v1/classifiers", json={"name": "topics", "examples": EXAMPLES}).status_code == 200
    assert classify(client).status_code == 200


def test_the_examples_of_the_docs_work(client: TestClient) -> None:
    assert client.post("/v1/classifiers", json=dict(Make.example)).status_code == 200
    (result,) = client.post("/v1/classify", json=dict(Classify.example)).json()["results"]
    assert result["scores"].keys() == {"billing", "bug"}
    assert client.delete("/v1/classifiers/tickets").status_code == 200
    page = client.get("/docs").text
    assert all(name in page for name in ("/v1/classifiers/{name}", "/v1/classify", "classifier_model_gone"))
