"""Plots: round ticks, and everything within the frame."""

import re
from xml.etree import ElementTree

import pytest

from energy.charts import (
    BOTTOM,
    HEIGHT,
    NAME_HEIGHT,
    NAME_WIDTH,
    TOP,
    WIDTH,
    Series,
    bars,
    picture,
    plot,
    standalone,
    ticks,
)


@pytest.mark.parametrize(
    ("most", "expected"),
    [(1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.0037, [0, 0.001, 0.002, 0.003, 0.004]), (430, [0, 100, 200, 300, 400, 500])],
)
def test_ticks_are_round(most: float, expected: list[float]) -> None:
    assert ticks(most) == expected
    assert ticks(0) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(66.1, 70.2, [66, 67, 68, 69, 70, 71]), (2.4, 2.7, [2.4, 2.5, 2.6, 2.7]), (5, 5, [5, 6])],
)
def test_ticks_need_not_begin_at_zero(least: float, most: float, expected: list[float]) -> None:
    assert ticks(most, least) == pytest.approx(expected)


def test_points_and_lines_stay_in_the_frame() -> None:
    points = [(0.0, 0.0), (3.0, 17.0), (9.9, 4.0)]
    svg = plot([Series("a", points, "a"), Series("b", points, "b", line=True)], "x", "y")
    places = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(places) == 3
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in places)
    assert svg.count("<polyline") == 1 and "legend" in svg


def test_a_line_of_a_single_point_is_seen_as_a_point() -> None:
    svg = picture([Series("a", [(1.0, 2.0)], "a", line=True)], "x", "y")
    assert "<circle" in svg and "<polyline" not in svg


def test_names_beside_points_neither_overlap_nor_leave_the_frame() -> None:
    points = [(1.0, 70.0), (1.0, 70.0), (1.01, 69.99), (4.0, 70.1), (1.0, 69.9), (1.02, 69.9)]
    labels = ["a model, int8", "a model, int8 blocks", "a model, int4", "a model, float32", "the least", "as low"]
    svg = picture([Series("all", points, "a", labels=labels, named=True)], "x", "y", y_from_zero=False)
    texts = re.findall(r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)</text>', svg)
    assert sorted(text for *_, text in texts) == sorted(labels)
    boxes = []
    for x, y, anchor, text in texts:
        width = NAME_WIDTH * len(text)
        left = float(x) - (width if anchor == "end" else 0)
        boxes.append((left, left + width, float(y)))
        assert left >= 0 and left + width <= WIDTH
        assert TOP <= float(y) <= HEIGHT - BOTTOM
    for number, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[:number]:
            assert right <= other_left or other_right <= left or abs(y - other_y) >= NAME_HEIGHT - 0.1
        for point_x, point_y in map(_numbers, re.findall(r'<circle [^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)):
            assert not left <= point_x <= right or abs(y - 4 - point_y) >= NAME_HEIGHT - 0.1


def test_a_line_leads_to_a_name_that_had_to_go_elsewhere() -> None:
    alone = Series("one", [(1.0, 70.0)], "a", labels=["a model"], named=True)
    together = Series("two", [(1.0, 70.0), (1.0, 70.0)], "a", labels=["a model", "another"], named=True)
    drawn = [
        picture([each, Series("far", [(9.0, 69.0), (9.0, 71.0)], "b")], "x", "y", False) for each in (alone, together)
    ]
    assert [svg.count('class="lead"') for svg in drawn] == [0, 1]


def _numbers(texts: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(map(float, texts))


def test_a_picture_of_its_own_is_well_formed_and_brings_its_colours() -> None:
    svg = standalone(picture([Series("a", [(1.0, 2.0)], "a")], "x < y", "y"))
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in svg


def test_names_are_escaped() -> None:
    assert "<b>" not in bars([("<b>", [("<b>", 1.0, "a")])], "<b>")


def test_nothing_known_is_said() -> None:
    assert "Nothing to show" in plot([Series("a", [], "a")], "x", "y")
    assert "Nothing to show" in bars([], "y")
