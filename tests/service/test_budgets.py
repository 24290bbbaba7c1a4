"""Estimates, and budgets that refuse a request or end its texts."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from energy.carbon import Carbon
from energy.ledger import Ledger
from energy.prediction import Text
from energy.types import Bill, Bills, Quality, RequestRecord, SettledRecord
from service.app import create_app
from service.books import Books
from service.budgets import CHECK_EVERY_TOKENS, keep_within
from service.core import Service
from service.engine.types import EncodeItem, Sampling, WriteItem
from service.metrics import Metrics
from service.settings import Settings
from service.tasks import TASKS
from service.tasks.base import Task
from tests.service.fakes import FakeAccount, FakeEngine, build
from tests.service.test_operations import samples

AnyTask = Task[Any, Any]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
WRITERS = ("translate", "generate", "summarize")
_CHAT = {"messages": [{"role": "user", "content": "hello"}]}
_TRANSLATION = {"q": "good", "source": "en", "target": "de"}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", _CHAT),
    "chat, stream": ("/v1/chat/completions", _CHAT | {"stream": True}),
    "completions": ("/v1/completions", {"prompt": ["hello", "good"]}),
    "responses": ("/v1/responses", {"input": "hello"}),
    "Hugging Face": ("/hf/tiny-generate", {"inputs": "hello"}),
    "Hugging Face, stream": ("/hf/tiny-generate", {"inputs": "hello", "stream": True}),
    "Hugging Face, chat": ("/hf/tiny-generate/v1/chat/completions", _CHAT),
    "LibreTranslate": ("/translate", _TRANSLATION),
    "native, stream": ("/v1/generate", {"input": "hello", "stream": True}),
}
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def ask(client: TestClient, task: AnyTask, **changes: Any) -> Any:
    return client.post(f"/v1/{task.name}", json={**task.example, **changes})


def estimate(client: TestClient, task: AnyTask, **changes: Any) -> Any:
    return client.post("/v1/energy/estimate", json={"task": task.name, **task.example, **changes})


@every_task
def test_an_estimate_runs_nothing_and_knows_nothing_at_first(
    client: TestClient, engine: FakeEngine, account: FakeAccount, task: AnyTask
) -> None:
    response = estimate(client, task)
    body = response.json()
    assert response.status_code == 200, body
    assert (body["task"], body["model"]) == (task.name, f"tiny-{task.name}")
    assert body["energy"] == {
        "active_j": None,
        "allocated_j": None,
        "low_j": None,
        "high_j": None,
        "gco2e": None,
        "quality": "unavailable",
    }
    assert body["error"] == {"median_relative": None, "requests": 0}
    assert body["usage"]["output_tokens"] is None
    assert (engine.items, account.records) == ([], {})


@every_task
def test_an_estimate_is_what_the_request_comes_to_cost(client: TestClient, task: AnyTask) -> None:
    for _ in range(12):
        usage = ask(client, task).json()["usage"]
    body = estimate(client, task).json()
    assert body["usage"] == usage
    assert body["energy"]["quality"] == "estimated"
    assert body["energy"]["active_j"] == pytest.approx(1.5, rel=1e-3)
    for figure in ("allocated_j", "low_j", "high_j"):
        assert body["energy"][figure] == pytest.approx(2.0, rel=1e-3)
    assert body["error"]["median_relative"] == pytest.approx(0, abs=1e-3)
    # The first had nothing to be compared with.
    assert body["error"]["requests"] == 11
    found = samples(client)
    assert found["wattle_energy_prediction_relative_error_count"] == {(f"tiny-{task.name}", task.name): 11}


@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"task": None}, 422, "task", "invalid_value"),
        ({"task": "sing"}, 422, "task", "invalid_value"),
        ({"input": ""}, 422, "input", "invalid_value"),
        ({"input": "good " * 500}, 422, "input", "too_many_tokens"),
        ({"input": ["good"] * 33}, 422, "input", "invalid_value"),
        ({"colour": "red"}, 422, "colour", "unknown_parameter"),
        ({"model": "nobody"}, 404, "model", "model_not_found"),
    ],
    ids=str,
)
def test_an_estimate_is_refused_as_the_request_would_be(
    client: TestClient, changes: dict[str, Any], status: int, param: str, code: str
) -> None:
    response = client.post("/v1/energy/estimate", json={"task": "sentiment", "input": "good", **changes})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


@every_task
def test_without_a_meter_nothing_is_foretold_from_earlier_bills(
    client: TestClient, account: FakeAccount, task: AnyTask
) -> None:
    ask(client, task)
    assert estimate(client, task).json()["energy"]["allocated_j"] is not None
    account.quality = Quality.UNAVAILABLE
    energy = estimate(client, task).json()["energy"]
    assert (energy["allocated_j"], energy["quality"]) == (None, "unavailable")


def test_an_estimate_names_what_is_missing(client: TestClient) -> None:
    for body, param in (({"input": "good"}, "task"), ({"task": "sentiment"}, "input")):
        error = client.post("/v1/energy/estimate", json=body).json()["error"]
        assert (error["param"], error["code"]) == (param, "missing_parameter")


@every_task
def test_what_would_cost_more_than_its_budget_is_refused(
    client: TestClient, engine: FakeEngine, account: FakeAccount, task: AnyTask
) -> None:
    ask(client, task)
    ran = len(engine.items)
    response = ask(client, task, energy_budget_j=1.9)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, "energy_budget_j", "energy_budget_exceeded")
    assert "expected to cost 2 J" in error["message"] and "1.9 J are allowed" in error["message"]
    assert len(engine.items) == ran
    assert [record.request.status for record in account.records.values()] == ["ok", "refused"]
    assert ask(client, task, energy_budget_j=2.1).status_code == 200


@every_task
@pytest.mark.parametrize("wrong", [0, -1, "1", True, [1]], ids=repr)
def test_a_budget_is_a_positive_number(client: TestClient, task: AnyTask, wrong: Any) -> None:
    response = ask(client, task, energy_budget_j=wrong)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "energy_budget_j")


@pytest.mark.parametrize("task", [task for task in TASKS if task.name in WRITERS], ids=lambda task: task.name)
def test_a_text_ends_where_its_budget_does(client: TestClient, engine: FakeEngine, task: AnyTask) -> None:
    engine.writes = tuple(range(5, 5 + 10 * CHECK_EVERY_TOKENS))
    changes = {"stop": []} if task.name == "generate" else {}
    # The account says 0.1 J more at every look: the third foresees that the fourth would be too much.
    body = ask(client, task, energy_budget_j=0.35, **changes).json()
    assert [result["finish_reason"] for result in body["results"]] == ["energy_budget"]
    assert body["results"][0]["text"]
    assert body["usage"]["output_tokens"] == 3 * CHECK_EVERY_TOKENS


def in_dialect(client: TestClient, dialect: str, **changes: Any) -> Any:
    path, body = DIALECTS[dialect]
    if dialect in ("Hugging Face", "Hugging Face, stream"):
        changes = {"parameters": changes}
    return client.post(path, json={**body, **changes})


@every_dialect
def test_every_dialect_keeps_to_a_budget(client: TestClient, engine: FakeEngine, dialect: str) -> None:
    assert in_dialect(client, dialect, energy_budget_j=5).status_code == 200
    ran = len(engine.items)
    response = in_dialect(client, dialect, energy_budget_j=1.9)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "energy_budget_exceeded")
    assert len(engine.items) == ran


def test_a_form_may_bring_a_budget(client: TestClient) -> None:
    for budget, status in (("5", 200), ("1.9", 422), ("none", 422)):
        response = client.post("/translate", data={**_TRANSLATION, "energy_budget_j": budget})
        assert response.status_code == status
    assert response.json()["error"]["param"] == "energy_budget_j"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "good", "energy_budget_j": 1.9}),
        ("/hf/tiny-embed", {"inputs": "good", "parameters": {"energy_budget_j": 1.9}}),
    ],
)
def test_embeddings_keep_to_a_budget(
    address: str, service: Service, embedder: str, path: str, body: dict[str, Any]
) -> None:
    service.account.on_settled = service.books.settled
    httpx.post(f"{address}/v1/embeddings", json={"input": "good"})
    response = httpx.post(address + path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "energy_budget_exceeded")


@pytest.mark.parametrize(
    ("dialect", "reason"),
    [
        ("chat", lambda body: body["choices"][0]["finish_reason"] == "length"),
        ("completions", lambda body: body["choices"][0]["finish_reason"] == "length"),
        ("responses", lambda body: body["incomplete_details"] == {"reason": "max_output_tokens"}),
    ],
)
def test_openais_clients_see_a_length_where_joules_give_out(
    client: TestClient, engine: FakeEngine, dialect: str, reason: Any
) -> None:
    engine.writes = tuple(range(5, 5 + 10 * CHECK_EVERY_TOKENS))
    assert reason(in_dialect(client, dialect, energy_budget_j=0.35).json())


def test_hugging_faces_clients_see_a_length_where_joules_give_out(client: TestClient, engine: FakeEngine) -> None:
    engine.writes = tuple(range(5, 5 + 10 * CHECK_EVERY_TOKENS))
    (text,) = in_dialect(client, "Hugging Face", energy_budget_j=0.35, details=True).json()
    assert text["details"]["finish_reason"] == "length"


def test_a_budget_needs_a_meter(client: TestClient, account: FakeAccount) -> None:
    account.quality = Quality.UNAVAILABLE
    error = client.post("/v1/sentiment", json={"input": "good", "energy_budget_j": 5}).json()["error"]
    assert (error["param"], error["code"]) == ("energy_budget_j", "invalid_value")


class TestAllowance:
    def item(self) -> WriteItem:
        return WriteItem("req-1", (1, 2), Sampling(max_tokens=64))

    def test_all_texts_of_a_request_share_it(self) -> None:
        spent = iter([10, 20, 30, 40, 50])
        one, two, other = keep_within([self.item(), self.item(), EncodeItem("req-1", (1,))], 35, lambda: next(spent))
        assert isinstance(one, WriteItem) and isinstance(two, WriteItem) and isinstance(other, EncodeItem)
        assert one.should_stop and two.should_stop
        assert not one.should_stop([1] * 3)  # not looked at
        assert not one.should_stop([1] * 4)
        assert not two.should_stop([1] * 4)
        assert one.should_stop([1] * 8) == "energy_budget"
        assert two.should_stop([1] * 5) == "energy_budget"
        assert next(spent) == 40

    def test_a_text_may_end_by_itself(self) -> None:
        item = replace(self.item(), should_stop=lambda ids: ids[-1] == 7)
        (kept,) = keep_within([item], 10**9, lambda: 0)
        assert isinstance(kept, WriteItem) and kept.should_stop
        assert kept.should_stop([1, 7]) is True
        assert kept.should_stop([7, 1]) is False

    def test_what_is_not_known_ends_nothing(self) -> None:
        (kept,) = keep_within([self.item()], 1, lambda: None)
        assert isinstance(kept, WriteItem) and kept.should_stop
        assert not kept.should_stop([1] * 8)


class TestDailyBudget:
    @pytest.fixture
    def client(self, models_folder: Path) -> Iterator[TestClient]:
        with TestClient(create_app(Settings(models=(models_folder,), daily_budget_j=3), build)) as client:
            yield client

    def test_a_spent_day_is_429_until_the_next(self, client: TestClient, account: FakeAccount) -> None:
        # What was spent on an earlier day does not count.
        assert [ask_once(client).status_code for _ in range(3)] == [200, 200, 200]
        account.time_s = time.time()
        assert [ask_once(client).status_code for _ in range(2)] == [200, 200]
        response = ask_once(client)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (429, "daily_budget_spent", "rate_limit_error")
        assert "3 J" in error["message"]
        assert 1 <= int(response.headers["retry-after"]) <= 86_400
        assert response.headers["x-should-retry"] == "false"
        budget = client.get("/v1/energy/live").json()["budget"]
        assert (budget["limit_j"], budget["spent_j"]) == (3.0, 4.0)
        assert client.post("/v1/energy/estimate", json={"task": "sentiment", "input": "good"}).status_code == 200

    def test_a_spent_day_is_429_for_everyone(self, client: TestClient, account: FakeAccount) -> None:
        account.time_s = time.time()
        for _ in range(2):
            ask_once(client)
        asked = [in_dialect(client, dialect) for dialect in DIALECTS]
        asked.append(client.put("/v1/knowledge/rivers/documents", json=[{"id": "danube", "text": "A river."}]))
        asked.append(client.post("/v1/knowledge/rivers/search", json={"query": "river"}))
        assert {(each.status_code, each.json()["error"]["code"]) for each in asked} == {(429, "daily_budget_spent")}

    def test_a_new_process_goes_on_where_the_last_one_stopped(self, tmp_path: Path) -> None:
        path = tmp_path / "ledger.sqlite"
        earlier = Ledger(path)
        for number in range(4):
            request = RequestRecord(f"req-{number}", "sentiment", "tiny", "ok", 10)
            bill = Bill(f"req-{number}", 1_000_000, 2_000_000, 0.5, Quality.ESTIMATED, settled=True)
            days_ago = 2 if number == 0 else 0
            carbon = Carbon("DEU").assumptions
            earlier.put(Bills.of(SettledRecord(request, bill, time.time() - days_ago * 86_400, carbon)))
        earlier.close()
        later = Ledger(path)
        books = Books(Metrics(), daily_budget_j=7)
        books.restore(later)
        later.close()
        standing = books.today()
        assert standing is not None and standing.spent_uj == 6_000_000 and not standing.is_spent
        forecast = books.predictor.predict("sentiment", "tiny", [Text(10)])
        assert forecast is not None and forecast.allocated_uj == pytest.approx(2_000_000, rel=1e-6)


def ask_once(client: TestClient) -> Any:
    return client.post("/v1/sentiment", json={"input": "good"})
