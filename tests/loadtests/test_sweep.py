"""Sweeps: the grid, the frontier, and the cheapest setting that keeps its promise."""

import pytest

from loadtests.sweep import (
    BadSetting,
    Point,
    as_document,
    as_html,
    cheapest,
    failed_point,
    frontier,
    grid,
    read_settings,
    table,
    verdict,
)


def point(name: str, queries_per_s: float, p95_ms: float | None, joules: float | None, failed: int = 0) -> Point:
    return Point({"threads": name}, queries_per_s, p95_ms, joules, joules, failed, name)


FAST = point("fast", 50, 20, 3.0)
CHEAP = point("cheap", 40, 90, 1.0)
MIDDLE = point("middle", 45, 50, 2.0)
BEATEN = point("beaten", 44, 60, 2.5)
FAILING = point("failing", 99, 1, 0.1, failed=1)
UNKNOWN = point("unknown", 99, 1, None)
ALL = [FAST, CHEAP, MIDDLE, BEATEN, FAILING, UNKNOWN]


def test_every_combination_is_run() -> None:
    settings = read_settings(["threads=1,2", "max-batch-tokens=512,2048"])
    assert len(grid(settings)) == 4
    assert {"threads": "2", "max_batch_tokens": "512"} in grid(settings)
    assert grid({}) == [{}]


@pytest.mark.parametrize("texts", [["threads"], ["threads="], ["=1"], ["a=1", "a=2"]])
def test_a_wrong_setting_says_how_to_write_it(texts: list[str]) -> None:
    with pytest.raises(BadSetting, match="threads=1,2"):
        read_settings(texts)


def test_the_frontier_holds_what_nothing_beats() -> None:
    assert frontier(ALL) == [CHEAP, MIDDLE, FAST]


def test_equal_points_are_both_kept() -> None:
    twin = point("twin", FAST.queries_per_s, FAST.p95_ms, FAST.allocated_j)
    assert frontier([FAST, twin]) == [FAST, twin]


def test_the_fewest_joules_within_the_latency() -> None:
    assert [cheapest(ALL, limit) for limit in (1000, 60, 20, 10)] == [CHEAP, MIDDLE, FAST, None]
    assert "threads=middle" in verdict(ALL, 60).text
    assert verdict(ALL, 10).bad and verdict([FAILING, UNKNOWN], None).bad
    assert "threads=cheap" in verdict(ALL, None).text


def test_a_setting_that_cannot_be_served_loses_nothing() -> None:
    lost = failed_point({"threads": "many"}, "the server did not start: threads")
    assert frontier([*ALL, lost]) == frontier(ALL) and not lost.usable
    below = table([*ALL, lost], None).below
    assert below[0].bad and "threads=many: the server did not start" in below[0].text


def test_its_page_and_document_name_them() -> None:
    page = as_html("Sweep", "", ALL, 60)
    assert page.count("<circle") == 2 * 4 and "threads=middle" in page
    assert as_document(ALL, 60)["cheapest"] == {"threads": "middle"}
