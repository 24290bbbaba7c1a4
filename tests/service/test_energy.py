"""The energy of past requests, one by one and in sums."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from energy import ledger as ledger_module
from energy.prediction import Predictor
from energy.types import Quality
from service.pace import Pace
from service.routes.energy import EXAMPLE, EnergyReport
from tests.service.fakes import FakeAccount, FakeEngine, wait_until

SINCE = {"since": "2023-11-14"}  # when the fake account's requests end


@pytest.fixture(autouse=True)
def _short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_INTERVAL_S", 0.01)


def ask(client: TestClient, **body: Any) -> str:
    return str(client.post("/v1/sentiment", json={"input": "good", **body}).json().get("id"))


def report(client: TestClient, requests: int, **query: Any) -> Any:
    """The report, once it holds so many requests: they are written within a second."""
    found: Any = None

    def complete() -> bool:
        nonlocal found
        found = client.get("/v1/energy", params={**SINCE, **query}).json()
        return bool(found["total"]["requests"] == requests)

    wait_until(complete)
    return found


def test_the_report_holds_what_was_billed(client: TestClient, engine: FakeEngine) -> None:
    ask(client)
    client.post("/v1/translate", json={"input": "good dog"})
    found = report(client, requests=2)
    assert [group["name"] for group in found["groups"]] == ["sentiment", "translate"]
    translate = found["groups"][1]
    assert (translate["active_j"], translate["allocated_j"], translate["gco2e"]) == (1.5, 2.0, 0.25)
    assert translate["j_per_query"] == {"mean": 2.0, "p50": 2.0, "p95": 2.0}
    assert translate["j_per_output_token"] == pytest.approx(2.0 / translate["usage"]["output_tokens"])
    assert (translate["phases"], translate["devices"]) == ({"encode": 2.0}, {"cpu": 2.0})
    assert found["total"]["quality"] == {"measured": 1.0, "apportioned": 0.0, "estimated": 0.0, "unavailable": 0.0}
    assert found["total"]["allocated_j"] == 4.0


def test_the_meters_balance(client: TestClient) -> None:
    ask(client)
    (meter,) = client.get("/v1/energy").json()["meters"]
    assert meter == {
        "device": "cpu",
        "source": "fake",
        "metered_j": 2.75,
        "attributed_j": 2.0,
        "unattributed_j": {"idle": 0.5},
        "open_j": 0.25,
        "residual_j": 0.0,
    }


def test_a_request_without_a_known_bill_is_null(client: TestClient, account: FakeAccount) -> None:
    account.quality = Quality.UNAVAILABLE
    ask(client)
    total = report(client, requests=1)["total"]
    assert (total["allocated_j"], total["gco2e"], total["j_per_query"]["mean"]) == (None, None, None)
    assert total["quality"]["unavailable"] == 1.0


def test_without_a_meter_nothing_is_timed_or_foretold(
    client: TestClient, account: FakeAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(Pace, "begin", lambda self, task, model: begun.append("timed") or {})
    monkeypatch.setattr(Predictor, "begin", lambda self, *request: begun.append("foretold"))
    ask(client)
    assert begun == ["timed", "foretold"]
    account.quality = Quality.UNAVAILABLE
    assert client.post("/v1/sentiment", json={"input": "good"}).json()["energy"]["allocated_j"] is None
    assert len(begun) == 2


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ("task", "sentiment"),
        ("model", "tiny-sentiment"),
        ("key", None),
        ("hour", "2023-11-14T22:00Z"),
        ("day", "2023-11-14"),
    ],
)
def test_every_way_to_group(client: TestClient, by: str, name: str | None) -> None:
    ask(client)
    found = report(client, requests=1, by=by)
    assert (found["by"], [group["name"] for group in found["groups"]]) == (by, [name])


def test_until_ends_the_time(client: TestClient) -> None:
    ask(client)
    report(client, requests=1)
    found = client.get("/v1/energy", params={**SINCE, "until": "2023-11-14T22:13:20Z"}).json()
    assert (found["since"], found["until"]) == ("2023-11-14T00:00:00+00:00", "2023-11-14T22:13:20+00:00")
    assert found["total"]["requests"] == 0


@pytest.mark.parametrize(
    ("path", "query", "param", "code"),
    [
        ("/v1/energy", {"since": "yesterday"}, "since", "invalid_value"),
        ("/v1/energy", {"until": ""}, "until", "invalid_value"),
        ("/v1/energy", {"since": "1h", "until": "2h"}, "since", "invalid_value"),
        ("/v1/energy", {"by": "caller"}, "by", "invalid_value"),
        ("/v1/energy", {"sinc": "1h"}, "sinc", "unknown_parameter"),
        ("/v1/energy/requests", {"limit": "0"}, "limit", "invalid_value"),
        ("/v1/energy/requests", {"limit": "1001"}, "limit", "invalid_value"),
        ("/v1/energy/requests", {"limit": "many"}, "limit", "invalid_value"),
    ],
)
def test_a_wrong_value_is_named(client: TestClient, path: str, query: dict[str, str], param: str, code: str) -> None:
    response = client.get(path, params=query)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, code)


def test_the_latest_requests_come_first(client: TestClient) -> None:
    ids = [ask(client) for _ in range(4)]
    found = client.get("/v1/energy/requests", params={"limit": 3}).json()["requests"]
    assert [each["id"] for each in found] == ids[:0:-1]
    assert found[0] == client.get(f"/v1/energy/requests/{ids[-1]}").json()
    assert found[0]["parts"] == [{"device": "cpu", "phase": "encode", "allocated_j": 2.0}]
    assert found[0]["carbon"]["machine_share"] == 1.0


def test_a_ledger_that_cannot_be_read_is_said(client: TestClient, account: FakeAccount) -> None:
    account.ledger.close()
    account.ledger.path.unlink()
    for path in ("/v1/energy", "/v1/energy/requests"):
        response = client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "ledger_unreadable")
        assert str(account.ledger.path) not in response.text


def test_a_ledger_that_cannot_be_written_is_said_where_operators_look(
    client: TestClient, account: FakeAccount
) -> None:
    assert client.get("/readyz").json()["ledger"] is None
    assert "wattle_ledger_healthy 1.0" in client.get("/metrics").text
    account.ledger.path.unlink()
    account.ledger.path.mkdir()
    ask(client)
    wait_until(lambda: not account.ledger.healthy)
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["ledger"]) == (200, "unable to open database file")
    metrics = client.get("/metrics").text
    assert "wattle_ledger_healthy 0.0" in metrics
    assert "wattle_ledger_dropped_records_total 0.0" in metrics


def test_the_documented_example_is_an_answer(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/v1/energy"]["get"]
    assert operation["responses"]["200"]["content"]["application/json"]["example"] == EXAMPLE
    assert EnergyReport.model_validate(EXAMPLE).total.answered == 2
    assert [each["name"] for each in operation["parameters"]] == ["since", "until", "by"]
    page = client.get("/docs").text
    assert "an ISO 8601 time (UTC unless it says otherwise)" in page
