"""Plots: round ticks, and everything within the frame."""

import re

import pytest

from loadtests.charts import HEIGHT, WIDTH, Series, bars, plot, ticks


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.0037, [0, 0.001, 0.002, 0.003, 0.004]), (430, [0, 100, 200, 300, 400, 500])],
)
def test_ticks_are_round(most: float, expected: list[float]) -> None:
    assert ticks(most) == expected
    assert ticks(0) == [0.0, 1.0]


def test_points_and_lines_stay_in_the_frame() -> None:
    points = [(0.0, 0.0), (3.0, 17.0), (9.9, 4.0)]
    svg = plot([Series("a", points, "a"), Series("b", points, "b", line=True)], "x", "y")
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(places) == 3
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in places)
    assert svg.count("<polyline") == 1 and "legend" in svg


def test_names_are_escaped() -> None:
    assert "<b>" not in bars([("<b>", [("<b>", 1.0, "a")])], "<b>")


def test_nothing_known_is_said() -> None:
    assert "Nothing to show" in plot([Series("a", [], "a")], "x", "y")
    assert "Nothing to show" in bars([], "y")
