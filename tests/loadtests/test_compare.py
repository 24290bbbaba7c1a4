"""Comparison: ratios of recorded runs, intervals that hold the truth, and what is refused."""

import random
from dataclasses import asdict
from typing import Any

import pytest

from loadtests.compare import NotComparable, compare, rows
from loadtests.scenario import read_scenario
from tests.loadtests.fakes import sample


def run(factor: float = 1.0, seed: int = 0, users: int = 4, **fields: Any) -> dict[str, Any]:
    chance = random.Random(seed)
    samples = [
        sample(
            at_s=2 + number / 5,
            latency_ms=factor * chance.uniform(80, 120),
            **{"allocated_j": factor * chance.uniform(0.4, 0.6), "active_j": 0.125, **fields},
        )
        for number in range(200)
    ]
    return {
        "scenario": read_scenario("mixed", users=users).model_dump(mode="json"),
        "requests": [asdict(each) for each in samples],
        "total": {"queries": len(samples)},
        "metered": None,
    }


def test_equal_runs_have_ratios_about_one() -> None:
    for ratio in compare(run(seed=1), run(seed=2), resamples=200):
        assert ratio.ratio is not None and ratio.low is not None and ratio.high is not None
        assert ratio.low <= 1 <= ratio.high
        assert not ratio.regressed(0.0)


def test_a_worse_run_is_told_from_chance() -> None:
    found = {(each.task, each.metric): each for each in compare(run(), run(1.5, seed=1), resamples=200)}
    latency, joules = found["total", "latency p95 (ms)"], found["translate", "allocated J/query"]
    for ratio in (latency, joules):
        assert ratio.low is not None and ratio.high is not None and 1.3 < ratio.low < 1.5 < ratio.high < 1.7
        assert ratio.regressed(0.1) and not ratio.regressed(0.7)
    assert found["total", "active J/query"].ratio == 1.0
    assert [row[-1] for row in rows(list(found.values()), 0.1)].count("worse") == 6


def test_the_same_reports_always_give_the_same_intervals() -> None:
    assert compare(run(), run(1.1, seed=3), resamples=50) == compare(run(), run(1.1, seed=3), resamples=50)


def test_joules_that_are_lost_are_a_regression() -> None:
    unbilled = run(allocated_j=None, active_j=None)
    lost = [each for each in compare(run(), unbilled, resamples=20) if each.regressed(9.0)]
    assert {each.metric for each in lost} == {"active J/query", "allocated J/query"}
    assert "not known" in lost[0].says
    assert not any(each.regressed(0.0) for each in compare(unbilled, unbilled, resamples=20))


def test_the_machines_meter_stands_in_for_bills() -> None:
    a, b = run(allocated_j=None, active_j=None), run(allocated_j=None, active_j=None)
    a["metered"], b["metered"] = {"active_j_per_query": 2.0}, {"active_j_per_query": 3.0}
    ratio = compare(a, b, resamples=20)[-1]
    assert (ratio.metric, ratio.ratio, ratio.low) == ("metered active J/query", 1.5, None)
    assert ratio.regressed(0.1)


def test_other_loads_are_not_compared() -> None:
    with pytest.raises(NotComparable, match="users 4 and 8"):
        compare(run(), run(users=8))
    empty = {**run(), "total": {"queries": 0}}
    with pytest.raises(NotComparable, match="first run"):
        compare(empty, run())
