"""Reports of recorded runs: complaints first, all four files, and nothing from elsewhere."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from loadtests.balance import Scrape
from loadtests.meter import Metered
from loadtests.plan import Plan, read_plan
from loadtests.record import BadReport, Observed, document, read_document, samples_of
from loadtests.report import RED, as_html, as_text, write_report
from loadtests.scenario import read_scenario
from tests.loadtests.fakes import sample

BEFORE = Scrape(10.0, 0.0, 4.0, {"idle": 6.0}, ("powercap",))


def scrape(bills_j: float) -> Scrape:
    return Scrape(30.0 + bills_j, 0.0, 4.0 + bills_j, {"idle": 26.0}, ("powercap",))


def observed(**fields: Any) -> Observed:
    scenario = read_scenario("mixed", duration_s=10.0).model_dump(mode="json")
    plan = Plan("mixed", scenario, "http://127.0.0.1:1", "wattle", "out")
    samples = [sample(at_s=number / 2, request_id=f"req-{number}") for number in range(20)]
    samples += [sample(at_s=number, task="sentiment", output_tokens=None) for number in range(10)]
    after = scrape(sum(each.allocated_j or 0 for each in samples))
    known = {"before": BEFORE, "ended": after, "after": after, "models": [{"name": "fake-en", "bits": 8}]}
    made = Observed(plan, plan.target, "2026-11-24T12:00:00+00:00", 10.0, samples)
    for name, value in {**known, **fields}.items():
        setattr(made, name, value)
    return made


def test_a_good_run_has_no_complaint() -> None:
    found = document(observed())
    assert found["notes"] == [] and found["balance"]["holds"]
    assert found["total"]["queries"] == 24, "those of the first two seconds are not counted"
    assert found["total"]["allocated_j"]["mean"] == 0.5
    assert RED not in as_text(found, colour=True)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"died_at_s": 4.0}, "stopped answering 4.0 s into the run"),
        ({"samples": []}, "No request was answered"),
        ({"samples": [sample(3.0), sample(3.0, error="500: internal_error")]}, "1 of 2 requests failed"),
        ({"samples": [sample(3.0, allocated_j=None)]}, "No answer came with a bill"),
        ({"samples": [sample(3.0), sample(3.0, allocated_j=None)]}, "1 answers came with a bill"),
        ({"samples": [sample(3.0, settled=False)]}, "1 bills were not final"),
        ({"before": None}, "There was no meter"),
        ({"after": scrape(40.0)}, "unaccounted for"),
    ],
)
def test_what_is_wrong_stands_first_and_in_red(fields: dict[str, Any], complaint: str) -> None:
    found = document(observed(**fields))
    assert any(complaint in note for note in found["notes"]), found["notes"]
    first = as_text(found, colour=True).splitlines()[2]
    assert first.startswith(RED)
    assert f'class="bad">{found["notes"][0].replace("&", "&amp;").replace(chr(39), "&#39;")}' in as_html(found)


def test_a_residual_above_a_hundredth_is_red() -> None:
    text = as_text(document(observed(after=scrape(40.0))), colour=True)
    assert f"{RED}Residual above 1%" in text


def test_this_machines_meter_gives_means_where_there_are_no_bills() -> None:
    unbilled = [sample(3.0, allocated_j=None, active_j=None) for _ in range(10)]
    metered = Metered(40.0, 20.0, 15.0, "powercap", "measured")
    found = document(observed(samples=unbilled, before=None, metered=metered))
    assert found["metered"]["active_j_per_query"] == 1.5
    assert found["metered"]["allocated_j_per_query"] == 3.5
    assert found["metered"]["active_j_per_output_token"] == 15 / 40
    assert "Energy by this machine's meter" in as_text(found)


def test_all_files_are_written_and_can_be_read_again(tmp_path: Path) -> None:
    found = document(observed(power=[(0.5, 12.0), (1.5, 14.0)]))
    write_report(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.html",
        "report.json",
        "requests.csv",
        "summary.csv",
    ]
    again = read_document(tmp_path)
    assert again == json.loads(json.dumps(found))
    assert len(samples_of(again)) == 24
    with (tmp_path / "summary.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["sentiment", "translate", "total"]
    assert rows[1]["allocated_j.mean"] == "0.5"
    with (tmp_path / "requests.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 30


def test_the_page_needs_nothing_else() -> None:
    page = as_html(document(observed(power=[(0.5, 12.0), (1.5, 14.0)])))
    assert page.count("<svg") == 5
    assert "8 bits" in page
    assert not any(word in page for word in ("<script", "<link", "<img", "http://www", "https://", "@import"))


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0}'])
def test_another_file_is_no_report(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadReport):
        read_document(tmp_path)


def test_a_plan_survives_its_file_and_never_holds_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    plan = Plan("mixed", {}, "http://127.0.0.1:1", "openai", "out", api_key_env="SOME_KEY").without_streams("why")
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.api_key == "secret"
    assert "secret" not in (tmp_path / "plan.json").read_text(encoding="utf-8")
