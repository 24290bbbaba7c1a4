"""The dashboard's page: what it is made of, what it may load, and the figures behind it."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from energy.types import Quality
from service.tasks import TASKS
from tests.service.fakes import FakeAccount, wait_until

FOLDER = Path(__file__).parents[2] / "service" / "dashboard"
SVG = "http://www.w3.org/2000/svg"
"""A name, not an address."""
SCRIPTS = sorted(FOLDER.glob("*.js"))


class Page(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


@pytest.fixture
def page(client: TestClient) -> Page:
    page = Page()
    page.feed(client.get("/dashboard").text)
    return page


def test_every_file_is_served_with_its_type_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    for file in FOLDER.iterdir():
        response = client.get("/dashboard" if file.name == "index.html" else f"/dashboard/{file.name}")
        assert (response.status_code, response.content) == (200, file.read_bytes())
        assert response.headers["content-type"] == f"{types[file.suffix]}; charset=utf-8"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        loads = response.text.replace(SVG, "")
        assert not re.search(r"https?:|//\w+\.|@import|url\(", loads), file.name


def test_what_the_page_refers_to_is_there(client: TestClient, page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for link in (*page.values("href"), *page.values("src")):
        if link.startswith("#"):
            assert link[1:] in ids
        elif link != "data:,":
            assert client.get(f"/{link}").status_code == 200, link


def test_the_page_has_a_name_for_every_part(page: Page) -> None:
    ids = page.values("id")
    for name in ("for", "aria-labelledby", "aria-controls"):
        assert set(page.values(name)) <= set(ids)
    labelled = page.values("for")
    for tag, attributes in page.tags:
        if tag in ("select", "input", "textarea"):
            assert attributes["id"] in labelled
        if attributes.get("role") == "region":
            assert "aria-labelledby" in attributes and attributes["tabindex"] == "0"
    assert ("html", {"lang": "en"}) in page.tags


def test_nothing_runs_inline(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag != "style" and (tag != "script" or attributes["src"])
        assert not [name for name in attributes if name == "style" or name.startswith("on")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_writes_text_only_and_asks_for_what_exists(client: TestClient, page: Page, script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", source)
    assert set(re.findall(r'\$\("([^"]+)"\)', source)) <= set(page.values("id"))
    paths = client.get("/openapi.json").json()["paths"]
    for path in re.findall(r'["`](v1/[^"`$]*)', source):
        assert any(known.startswith(f"/{path}") for known in paths), path
    for module in re.findall(r'from "\./([^"]+)"', source):
        assert (FOLDER / module).exists()


def test_every_task_has_what_the_playground_builds_on(client: TestClient) -> None:
    openapi = client.get("/openapi.json").json()
    for task in TASKS:
        operation = openapi["paths"][f"/v1/{task.name}"]["post"]
        body = operation["requestBody"]["content"]["application/json"]
        assert (operation["tags"], operation["operationId"]) == (["tasks"], task.name)
        schema = openapi["components"]["schemas"][body["schema"]["$ref"].rpartition("/")[2]]
        assert set(body["example"]) <= set(schema["properties"])


def test_the_live_figures(client: TestClient, account: FakeAccount) -> None:
    wait_until(lambda: client.get("/v1/energy/live").json()["moments"])
    empty = client.get("/v1/energy/live").json()
    assert (empty["tasks"], empty["recent"], empty["grid_zone"], empty["budget"]) == ({}, [], None, None)
    answer = client.post("/v1/sentiment", json={"input": "good"}).json()
    client.post("/v1/sentiment", json={"input": "good " * 500})
    account.quality = Quality.UNAVAILABLE
    client.post("/v1/translate", json={"input": "good"})
    live = client.get("/v1/energy/live").json()
    assert (live["quality"], live["grid_zone"]) == ("unavailable", "DEU")
    assert live["meters"] == [{"device": "cpu", "source": "fake"}]
    moment = live["moments"][0]
    assert (list(moment["tasks"]), moment["unattributed"]) == (["sentiment"], {"idle": 0.5})
    assert moment["metered_j"] == moment["tasks"]["sentiment"] + 0.75
    sentiment, translate = live["tasks"]["sentiment"], live["tasks"]["translate"]
    assert (sentiment["requests"], sentiment["allocated_j"], sentiment["gco2e"]) == (1, 2.0, 0.25)
    assert sentiment["counts"][live["bounds_j"].index(2.0)] == sum(sentiment["counts"]) == 1
    assert len(sentiment["counts"]) == len(live["bounds_j"]) + 1
    assert (translate["requests"], translate["unknown"], sum(translate["counts"])) == (1, 1, 0)
    latest, first = live["recent"]
    assert latest["energy"]["allocated_j"] is None
    assert (first["id"], first["energy"], first["usage"]) == (answer["id"], answer["energy"], answer["usage"])
    assert json.dumps(live).count("refused") == 0
