"""Figures of recorded runs, worked out by hand."""

import pytest

from loadtests.figures import by_task, drift, figures, spread, windows
from tests.loadtests.fakes import sample


def test_a_request_of_several_texts_is_several_queries() -> None:
    run = [sample(allocated_j=1.0, active_j=0.5), sample(texts=3, allocated_j=6.0, active_j=3.0)]
    found = figures(run, duration_s=2.0)
    assert (found.requests, found.queries, found.requests_per_s, found.queries_per_s) == (2, 4, 1.0, 2.0)
    assert found.allocated_j and found.active_j
    assert (found.allocated_j.mean, found.allocated_j.p50) == (7 / 4, 2.0)
    assert found.active_j.mean == 3.5 / 4
    assert found.idle_share == 0.5


def test_percentiles_lie_between_ranks() -> None:
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found and (found.mean, found.p50, found.p95, found.p99) == (
        3.0,
        3.0,
        pytest.approx(4.8),
        pytest.approx(4.96),
    )
    assert spread([]) is None


def test_joules_per_token_count_only_who_wrote() -> None:
    run = [
        sample(allocated_j=2.0, output_tokens=8),
        sample(allocated_j=4.0, output_tokens=None),
        sample(output_tokens=0),
    ]
    assert figures(run, 1.0).allocated_j_per_output_token == 0.25
    assert figures([sample(output_tokens=None)], 1.0).allocated_j_per_output_token is None


def test_what_nobody_knows_is_not_zero() -> None:
    nameless = {"active_j": None, "allocated_j": None, "gco2e": None, "quality": None, "output_tokens": None}
    run = [sample(**nameless, settled=False), sample(settled=False)]
    found = figures(run, 1.0)
    assert (found.without_bill, found.unsettled) == (1, 1)
    assert found.allocated_j and found.allocated_j.mean == 0.5
    alone = figures(run[:1], 1.0)
    assert (alone.allocated_j, alone.active_j, alone.gco2e_per_1000, alone.idle_share, alone.quality) == (None,) * 5


def test_failures_have_no_latency() -> None:
    found = figures([sample(latency_ms=10), sample(latency_ms=1e6, error="no answer: Timeout")], 1.0)
    assert found.failed == 1 and found.latency_ms and found.latency_ms.p99 == 10
    assert figures([sample(error="500")], 1.0).latency_ms is None


def test_the_weakest_meter_names_the_whole() -> None:
    run = [sample(quality=quality) for quality in ("measured", "estimated", "apportioned")]
    assert figures(run, 1.0).quality == "estimated"


def test_grams_of_a_thousand_queries() -> None:
    assert figures([sample(gco2e=0.5, texts=2), sample(gco2e=None)], 1.0).gco2e_per_1000 == 250.0


def test_tasks_apart() -> None:
    found = by_task([sample(), sample(task="answer"), sample()], 1.0)
    assert {name: each.requests for name, each in found.items()} == {"answer": 1, "translate": 2}


def test_windows_show_load_and_joules() -> None:
    run = [sample(at_s=0.0, latency_ms=500), sample(at_s=0.5, latency_ms=1000, allocated_j=4.0)]
    first, second = windows(run, 0.0, 2.0, count=2)
    assert (first.queries_per_s, first.in_flight, first.p50_ms, first.allocated_j) == (1.0, 1.0, 500, 0.5)
    assert (second.queries_per_s, second.in_flight, second.allocated_j) == (1.0, 0.5, 4.0)
    empty = windows([], 0.0, 1.0, count=1)[0]
    assert (empty.p95_ms, empty.allocated_j, empty.in_flight) == (None, None, 0.0)


def test_drift_compares_the_ends_of_a_run() -> None:
    run = [sample(at_s=0.5, latency_ms=10), sample(at_s=5, latency_ms=99), sample(at_s=9.5, latency_ms=15)]
    assert drift(run, 0.0, 10.0, lambda each: each.latency_ms) == 1.5
    assert drift(run[:2], 0.0, 10.0, lambda each: each.latency_ms) is None
