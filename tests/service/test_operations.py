"""Probes, metrics, docs and the bills of the past."""

import json
import re
import shlex
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from service import __version__
from service.engine.types import EncodeItem
from service.errors import ModelNotFound
from service.models import Model
from service.repository import Repository
from service.tasks import TASKS
from tests.service.fakes import FakeAccount, FakeEngine


def samples(client: TestClient) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by metric name and label values, in the order of the labels' names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(value for _, value in sorted(sample.labels.items()))] = (
                sample.value
            )
    return found


def test_ready_names_the_default_model_of_every_task(client: TestClient) -> None:
    body = client.get("/readyz").json()
    assert body["status"] == "ready"
    assert body["tasks"] == {task.name: f"tiny-{task.name}" for task in TASKS}
    assert body["refused"] == []


def test_energy_balances_in_every_scrape(client: TestClient) -> None:
    for _ in range(3):
        client.post("/v1/sentiment", json={"input": "good"})
        found = samples(client)
        attributed = sum(found["wattle_attributed_energy_joules_total"].values())
        unattributed = sum(found["wattle_unattributed_energy_joules_total"].values())
        assert found["wattle_meter_energy_joules_total"]["cpu", "fake"] == attributed + unattributed
    assert attributed == 6.0
    assert found["wattle_open_energy_joules"] == {("cpu",): 0.25}
    assert found["wattle_energy_residual_joules"] == {("cpu",): 0}


def test_requests_are_counted_by_task_model_and_end(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/sentiment", json={"input": ["good", "bad"]})
    client.post("/v1/sentiment", json={"input": "good " * 500})
    engine.failure = RuntimeError("broken")
    client.post("/v1/sentiment", json={"input": "good"})
    found = samples(client)
    model, task = ours = ("tiny-sentiment", "sentiment")
    assert found["wattle_request_count_total"] == {(model, end, task): 1 for end in ("ok", "refused", "failed")}
    assert found["wattle_input_tokens_total"] == {ours: 6}
    assert found["wattle_request_energy_joules_sum"][model, "measured", task] == 6.0
    assert found["wattle_carbon_grams_total"] == {ours: 0.75}
    assert found["wattle_queue_duration_seconds_sum"][ours] == 0.002
    assert found["wattle_inference_duration_seconds_sum"][ours] == 0.005
    assert found["wattle_request_duration_seconds_count"][ours] == 3


def test_the_queue_is_shown(client: TestClient, engine: FakeEngine) -> None:
    engine.holds = True
    engine.submit("tiny-sentiment", [EncodeItem("req-1", (2, 3))] * 3)
    found = samples(client)
    assert (found["wattle_queue_size"], found["wattle_running_size"]) == ({(): 3}, {(): 0})


def test_no_label_names_a_caller_and_an_unknown_model_is_no_label(client: TestClient) -> None:
    client.post("/v1/sentiment", json={"input": "good", "model": "somebody"}, headers={"authorization": "Bearer key"})
    assert "somebody" not in client.get("/metrics").text


def test_a_past_request_shows_its_bill(client: TestClient) -> None:
    answer = client.post("/v1/sentiment", json={"input": "good"}).json()
    found = client.get(f"/v1/energy/requests/{answer['id']}").json()
    assert found["energy"] == answer["energy"]
    assert (found["id"], found["status"], found["task"]) == (answer["id"], "ok", "sentiment")
    assert (found["usage"], found["timings"]) == (answer["usage"], answer["timings"])
    assert found["finished_at"] == "2023-11-14T22:13:20+00:00"
    assert found["carbon"]["zone"] == "DEU"


def test_a_refused_request_is_in_the_ledger_too(client: TestClient, account: FakeAccount) -> None:
    client.post("/v1/sentiment", json={"input": "good " * 500})
    (record,) = account.records.values()
    assert (record.request.status, record.request.input_tokens) == ("refused", 0)


def test_a_model_that_goes_while_a_request_comes_in_has_refused_it(
    client: TestClient, account: FakeAccount, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(self: Repository, model: Model) -> None:
        raise ModelNotFound(model.name, [])

    monkeypatch.setattr(Repository, "use", use)
    assert client.post("/v1/sentiment", json={"input": "good"}).status_code == 404
    assert [record.request.status for record in account.records.values()] == ["refused"]


class Page(HTMLParser):
    """What a page shows, refers to and anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_docs_show_every_operation_and_need_no_network(client: TestClient) -> None:
    response = client.get("/docs")
    page = Page()
    page.feed(response.text)
    shown = "".join(page.text)
    openapi = client.get("/openapi.json").json()
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in shown
            assert operation["operationId"] in page.ids
    for task in TASKS:
        for name in task.request.model_fields:
            assert name in shown
    assert all(re.fullmatch(r"#\w+|openapi\.json", link) for link in page.links)
    assert "url(" not in response.text and "@import" not in response.text


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_curl_of_the_docs_is_the_example(client: TestClient, task: Any) -> None:
    page = Page()
    page.feed(client.get("/docs").text)
    shown = [text.replace("\\\n", "") for text in page.text if text.startswith("curl ")]
    commands = {words[2]: words for words in map(shlex.split, shown)}
    words = commands[f"http://testserver/v1/{task.name}"]
    assert words[3:5] == ["-H", "content-type: application/json"]
    assert json.loads(words[6]) == task.example


def test_the_root_leads_to_the_docs(client: TestClient) -> None:
    assert client.get("/").url.path == "/docs"


def test_routes_stand_in_the_application_itself(client: TestClient) -> None:
    """Routers in it would make all of theirs once more while the first request waits."""
    app: Any = client.app
    assert {"/readyz", "/v1/translate"} <= {getattr(route, "path", None) for route in app.routes}


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
