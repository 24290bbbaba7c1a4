"""The Grafana dashboard and the Prometheus rules ask for what `/metrics` shows, and the rules pass their own tests."""

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from energy.types import Phase, Work
from tests.energy.fakes import step_of

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RULES = (FOLDER / "rules.yml").read_text(encoding="utf-8")


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel["targets"]]


# Of Prometheus itself.
FOREIGN_LABELS = {"instance", "job"}
RULE_EXPRESSIONS = [" ".join(text.split()) for text in re.findall(r"expr: (?:>-)?(.*(?:\n {10,}.*)*)", RULES)]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


STEP = step_of(Work(Phase.ENCODE, ["r"], [5]))


@pytest.fixture
def exported(client: TestClient) -> dict[str, set[str]]:
    """Every series that the service shows after a request, and the names of its labels."""
    client.post("/v1/translate", json={"input": "good dog"})
    client.app.state.service.metrics.step(STEP)  # type: ignore[attr-defined]
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def names(text: str) -> set[str]:
    """The metrics that an expression names; what has a colon is made by a recording rule."""
    return {name for name in re.findall(r"[\w:]*wattle_[\w:]*", text) if ":" not in name}


def labels(text: str) -> set[str]:
    """The labels that an expression selects or groups by."""
    selected = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", text)
    grouped = re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", text)
    return {*selected, *(label.strip() for group in grouped for label in group.split(","))}


def test_a_step_counts_once_with_the_rows_and_tokens_of_each_of_its_passes(client: TestClient) -> None:
    work = Work(Phase.DECODE, "ab", [1, 1], [4, 4])
    client.app.state.service.metrics.step(step_of(work, model="passes", passes=3))  # type: ignore[attr-defined]
    lines = [line for line in client.get("/metrics").text.splitlines() if 'model="passes"' in line]
    sums = {line.split("{")[0]: float(line.split()[-1]) for line in lines if "_sum{" in line or "_count{" in line}
    assert sums == {
        f"wattle_batch_next_{what}_{kind}": value
        for what in ("size", "tokens")
        for kind, value in (("sum", 2), ("count", 1))
    }


def test_the_helpers_see_what_is_there() -> None:
    assert len(RULE_EXPRESSIONS) == RULES.count("expr:") == 16
    text = 'sum by (le, task) (rate(wattle_a_bucket{task=~"x",status!="ok"}[5m])) / on (job) task:wattle_b:rate5m'
    assert names(text) == {"wattle_a_bucket"}
    assert labels(text) == {"le", "task", "status", "job"}


def test_the_dashboard_asks_for_what_is_exported(exported: dict[str, set[str]]) -> None:
    asked = [*expressions(DASHBOARD["panels"]), DASHBOARD["templating"]["list"][1]["query"]["query"]]
    assert {name for text in asked for name in names(text)} <= set(exported)


def test_the_rules_ask_for_what_is_exported_or_recorded(exported: dict[str, set[str]]) -> None:
    recorded = set(re.findall(r"record: (\S+)", RULES))
    for text in RULE_EXPRESSIONS:
        assert names(text) <= set(exported), text
        assert set(re.findall(r"\w+:wattle_\w+:\w+", text)) <= recorded, text


def test_every_label_exists_on_a_metric_beside_it(exported: dict[str, set[str]]) -> None:
    for text in (*expressions(DASHBOARD["panels"]), *RULE_EXPRESSIONS):
        known = FOREIGN_LABELS.union(*(exported[name] for name in names(text)))
        # What a recording rule makes has the labels in its name.
        known.update(label for made in re.findall(r"(\w+):wattle", text) for label in made.split("_"))
        assert labels(text) <= known, text


def test_the_dashboard_s_panels_lie_beside_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert apart or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


@needs_promtool
@pytest.mark.parametrize("command", ["check rules rules.yml", "test rules rules.test.yml"])
def test_promtool_agrees(command: str) -> None:
    done = subprocess.run(["promtool", *command.split()], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_every_expression_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__rate_interval", "1m", text)}
        for number, text in enumerate(expressions(DASHBOARD["panels"]))
    ]
    # JSON is YAML.
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
