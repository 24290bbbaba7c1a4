"""The page on runs: exact sums from exact records, break-even, and what is said where figures are missing."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.manifest import Stage, write_manifest
from tests.training.test_frontier import manifest, variant
from training.commands import run_report
from training.errors import TrainingError
from training.records import LOG, write_ancestors, write_stage
from training.report import BreakEven, break_even, read_run
from training.settings import Settings


def line(step, **changes):
    """After ``step`` steps of 1,000 tokens, half a second and 4 joules each."""
    known = {"joules": 4.0 * step, "loss": 10.0 / step, "learning_rate": 1e-3}
    rates = {"tokens_per_s": 2000.0, "joules_per_token": 0.004}
    return {"step": step, "tokens": 1000 * step, "elapsed_s": 0.5 * step, **known, **rates, **changes}


def stage(name, joules=1000.0, **changes):
    return Stage(
        **{
            "name": name,
            "kind": "fine-tune",
            "data": ("sentiment/days",),
            "parameters": 5000,
            "steps": 250,
            "tokens": 250_000,
            "elapsed_s": 125.0,
            "joules": joules,
            "gco2e": 0.25,
            "quality": "estimated",
            "device": "cpu",
            "loss": 0.5,
            **changes,
        }
    )


def write_run(runs, name, lines, *lineage):
    run = runs / name
    run.mkdir(parents=True)
    (run / LOG).write_text("".join(json.dumps(each) + "\n" for each in lines))
    if lineage:
        write_ancestors(run, lineage[:-1])
        write_stage(run, lineage[-1])


TEACHER = manifest("teacher", variant("rowwise", 8, 69.5, 0.25), lineage=(stage("trunk"), stage("teacher")))
STUDENT = manifest("student", variant("rowwise", 8, 66.0, 0.05))
DISTILLED = stage("student", 700.0, kind="distil", parent="teacher", teacher="teacher", teacher_joules=300.0)
LINEAGE = (stage("trunk"), stage("teacher"), DISTILLED)
MODELS = {"teacher": TEACHER, "student": STUDENT}


def test_a_student_pays_for_itself_and_not_for_what_made_its_teacher():
    found = break_even(LINEAGE, MODELS)
    assert found == BreakEven(
        "student", "teacher", 1000.0, 0.05, 0.25, "estimated", together=True, counts_targets=True
    )
    assert found.queries == 5000
    pretrained = (stage("own-start", 200.0), DISTILLED)
    assert break_even(pretrained, MODELS).queries == 6000


def test_no_teacher_no_break_even():
    assert break_even((stage("trunk"), stage("teacher")), MODELS) is None


JOULES = st.floats(0.001, 1e6, allow_nan=False)


@given(spent=JOULES, student=JOULES, teacher=JOULES)
def test_break_even_is_the_first_count_at_which_both_have_cost_the_same_or_never(spent, student, teacher):
    queries = BreakEven("s", "t", spent, student, teacher, "estimated", together=True, counts_targets=True).queries
    if student >= teacher:
        assert queries == math.inf
    else:
        assert spent + queries * student <= queries * teacher * (1 + 1e-9)
        assert spent + (queries - 1) * student >= (queries - 1) * teacher * (1 - 1e-9)


@pytest.mark.parametrize("unknown", ["spent_j", "student_j", "teacher_j"])
def test_of_an_unknown_figure_nothing_follows(unknown):
    known = {"spent_j": 1.0, "student_j": 1.0, "teacher_j": 2.0, unknown: None}
    assert BreakEven("s", "t", quality="estimated", together=True, counts_targets=True, **known).queries is None


def test_the_page_shows_lineage_break_even_and_every_plot(tmp_path, capsys):
    write_run(tmp_path, "student", [line(n) for n in range(1, 6)], *LINEAGE)
    for name, each in MODELS.items():
        (tmp_path / "out" / name).mkdir(parents=True)
        write_manifest(tmp_path / "out" / name, each)
    page = tmp_path / "page.html"
    run_report(["student"], page, Settings(runs=tmp_path, out=tmp_path / "out"))
    assert capsys.readouterr().out.strip() == str(page)
    html = page.read_text()
    for title in (
        "Loss over joules",
        "Loss over tokens",
        "Tokens a second",
        "Joules a token",
        "Lineage",
        "Break-even",
    ):
        assert f"<h2>{title}</h2>" in html
    assert "<td>5,000 (estimated)</td>" in html
    assert "All stages: 2,700 J, 0.75 gCO2e" in html
    assert html.count("<td>trunk</td>") == 1
    lines = re.findall(r'<polyline class="a" points="([^"]+)"', html)
    assert [len(points.split()) for points in lines] == [5] * 5
    assert "http" not in html.replace("http://www.w3.org", "")


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    write_run(tmp_path, "half", [line(1), line(2)])
    page = tmp_path / "page.html"
    run_report(["half"], page, Settings(runs=tmp_path, out=tmp_path))
    html = page.read_text()
    assert "<td>has not ended</td>" in html and "<td>2,000</td>" in html
    assert "Break-even" not in html


def test_without_a_meter_the_loss_is_still_drawn_over_tokens(tmp_path):
    lines = [line(n, joules=None, joules_per_token=None) for n in (1, 2, 3)]
    write_run(tmp_path, "blind", lines, stage("blind", None, gco2e=None, quality="unavailable"))
    page = tmp_path / "page.html"
    run_report(["blind"], page, Settings(runs=tmp_path, out=tmp_path))
    html = page.read_text()
    assert "blind: joules are unavailable" in html
    assert html.count("Nothing to show") == 2 and html.count("<polyline") == 3


def test_meters_that_do_not_compare_are_said(tmp_path):
    write_run(tmp_path, "a", [line(1), line(2)], stage("a"))
    write_run(tmp_path, "b", [line(1), line(2)], stage("b", quality="measured"))
    page = tmp_path / "page.html"
    run_report(["a", "b", "a"], page, Settings(runs=tmp_path, out=tmp_path))
    html = page.read_text()
    assert "do not compare: some are estimated and some measured" in html
    assert html.count("<polyline") == 10


def test_targets_of_unknown_cost_are_left_out_and_that_is_said(tmp_path):
    lineage = (stage("teacher"), DISTILLED.model_copy(update={"teacher_joules": None}))
    assert break_even(lineage, MODELS).spent_j == 700.0
    write_run(tmp_path, "student", [line(1), line(2)], *lineage)
    page = tmp_path / "page.html"
    run_report(["student"], page, Settings(runs=tmp_path, out=tmp_path))
    assert "wrote beforehand, if anything, has no known cost and is left out" in page.read_text()


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (manifest("student", variant("rowwise", 8, 66.0, 0.5)), "<td>never</td>"),
        (manifest("student"), "joules a query of student are unknown; `wattle quantise"),
        (
            manifest("student", variant("rowwise", 8, 66.0, 0.05, load=None)),
            "student and teacher were not measured in the same rounds",
        ),
    ],
)
def test_break_even_that_is_none_or_rough_is_said(tmp_path, student, said):
    write_run(tmp_path, "student", [line(1), line(2)], *LINEAGE)
    for each in (TEACHER, student):
        (tmp_path / "out" / each.name).mkdir(parents=True)
        write_manifest(tmp_path / "out" / each.name, each)
    page = tmp_path / "page.html"
    run_report(["student"], page, Settings(runs=tmp_path, out=tmp_path / "out"))
    assert said in page.read_text()


def test_no_such_run_and_one_without_records_are_refused(tmp_path):
    write_run(tmp_path, "known", [line(1)])
    (tmp_path / "silent").mkdir()
    with pytest.raises(TrainingError, match="no such run; there are known, silent"):
        read_run(tmp_path, "gone")
    with pytest.raises(TrainingError, match=r"there are none in .*nowhere"):
        read_run(tmp_path / "nowhere", "gone")
    with pytest.raises(TrainingError, match="`wattle train silent` writes it"):
        read_run(tmp_path, "silent")
    with pytest.raises(TrainingError, match="cannot be written"):
        run_report(["known"], tmp_path / "gone" / "page.html", Settings(runs=tmp_path, out=tmp_path))
