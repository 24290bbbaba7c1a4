"""Quality against joules: which points no other beats, and what must not be compared."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.manifest import Load, Parent, Quantisation, Score, SpecialIds, Variant, write_manifest
from models.manifest import Manifest as ModelManifest
from tests.tiny import tiny_config
from training.commands import run_frontier
from training.errors import TrainingError
from training.frontier import Frontier, Point, draw, frontiers

LOAD = Load(texts_per_request=16, queries=144, rounds=9, cores=2, processor="a processor", foreign_cores=0.25)


def variant(scheme, bits, score, joules, rows=50, metric="macro recall", **changes):
    scores = (Score(data="sentiment/days", split="validation", metric=metric, value=score, rows=rows),)
    known = {"active_j_per_query": joules, "quality": "estimated", "load": LOAD, **changes}
    return Variant(scheme=scheme, bits=bits, size_mb=bits / 4, parity_cosine=1.0, scores=scores, **known)


def manifest(name, *variants, **changes):
    return ModelManifest(
        **{
            "name": name,
            "revision": "1",
            "description": "For the tests.",
            "tasks": ("sentiment",),
            "languages": ("en",),
            "config": tiny_config("bert-classify"),
            "max_input_tokens": 16,
            "special_ids": SpecialIds(pad=0),
            "labels": ("a", "b", "c"),
            "quantisation": Quantisation(scheme="rowwise", bits=8),
            "variants": variants,
            **changes,
        }
    )


TEACHER = manifest("teacher", variant("none", 32, 70.0, 0.4), variant("rowwise", 8, 69.5, 0.2))
STUDENT = manifest(
    "student",
    variant("rowwise", 8, 66.0, 0.1),
    variant("blockwise", 4, 65.0, 0.3),
    parent=Parent(name="teacher", relation="distilled", licence="CC0"),
)


def frontier(places, metric="macro recall"):
    points = tuple(
        Point(
            model=str(n),
            parent="",
            way="int8",
            size_mb=1.0,
            scores=(),
            quality=quality,
            active_j=joules,
            exported=True,
        )
        for n, (quality, joules) in enumerate(places)
    )
    headline = Score(data="d", split="validation", metric=metric, value=0.0, rows=1)
    return Frontier("sentiment-en", headline, points, "estimated", LOAD)


PLACES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=12)


@given(PLACES)
def test_no_point_is_better_than_a_best_one_and_each_other_is_beaten_by_one(places):
    found = frontier(places)
    best = found.best
    assert best

    def beats(a, b):
        return (
            (a.quality, -a.active_j) != (b.quality, -b.active_j)
            and a.quality >= b.quality
            and a.active_j <= b.active_j
        )

    for point in found.points:
        assert any(beats(other, point) for other in best) is (point not in best)
    assert [p.active_j for p in best] == sorted(p.active_j for p in best)
    assert [p.quality for p in best] == sorted(p.quality for p in best)


@given(PLACES)
def test_where_lower_is_better_the_frontier_is_that_of_the_negated_quality(places):
    lower = frontier(places, "bits per byte").best
    higher = frontier([(-quality, joules) for quality, joules in places]).best
    assert [point.model for point in lower] == [point.model for point in higher]


def test_a_page_with_a_picture_for_each_task_and_language(tmp_path, capsys):
    other = manifest("german", variant("rowwise", 8, 50.0, 0.1), languages=("de",))
    for each in (TEACHER, STUDENT, other):
        (tmp_path / each.name).mkdir()
        write_manifest(tmp_path / each.name, each)
    folders = [tmp_path / name for name in ("teacher", "student", "german")]
    run_frontier(folders, tmp_path / "docs" / "frontier.md")
    page = (tmp_path / "docs" / "frontier.md").read_text()
    assert page.index("## sentiment-de") < page.index("## sentiment-en")
    assert "| teacher | float32 | 8 | 70.00 | 0.4 | yes |" in page
    assert "| student (student of teacher) | int8 rowwise, as exported | 2 | 66.00 | 0.1 | yes |" in page
    assert "| student (student of teacher) | int4 blockwise | 1 | 65.00 | 0.3 |  |" in page
    assert "active J a query (estimated)" in page
    assert (
        "requests of 16 texts" in page and "on 2 cores (a processor); other processes kept 0.25 of them busy" in page
    )
    for name in ("sentiment-de", "sentiment-en"):
        assert f"(images/frontier-{name}.svg)" in page
        ElementTree.parse(tmp_path / "docs" / "images" / f"frontier-{name}.svg")
    assert "student int8 rowwise (66.00 at 0.1 J)" in capsys.readouterr().out


def test_a_setting_is_told_where_there_are_several():
    scores = {
        said: (Score(data="d", split="validation", metric="macro recall", value=60.0, rows=5, setting=said),)
        for said in ("", "beams 1")
    }
    whole, greedy = (variant("rowwise", 8, 0, 1.0).model_copy(update={"scores": each}) for each in scores.values())
    both = frontiers([manifest("model", whole, greedy)])[0]
    assert [point.way for point in both.points] == ["int8 rowwise", "int8 rowwise, beams 1"]
    assert [point.way for point in frontiers([manifest("model", greedy)])[0].points] == ["int8 rowwise"]


def test_the_picture_names_every_point_and_joins_the_best():
    found = frontiers([TEACHER, STUDENT])[0]
    svg = draw(found)
    for point in found.points:
        assert f">{point.model} {point.way}</text>" in svg
    line = svg.partition("<polyline")[2].partition('points="')[2].partition('"')[0]
    assert len(line.split()) == len(found.best) == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (manifest("new"), "new: its joules per query are not known"),
        (manifest("new", variant("rowwise", 8, 66.0, None)), "not known"),
        (manifest("new", variant("rowwise", 8, 66.0, 0.1, load=None)), "not known"),
        (manifest("new", variant("rowwise", 8, 66.0, 0.1, quality="measured")), "different meters"),
        (manifest("new", variant("rowwise", 8, 66.0, 0.1, rows=60)), "different rows"),
        (
            manifest("new", variant("rowwise", 8, 66.0, 0.1, load=LOAD.model_copy(update={"cores": 8}))),
            "different times",
        ),
        (
            manifest(
                "new",
                tasks=(),
                config=tiny_config("bert-classify").model_copy(
                    update={"head": "embed", "n_labels": 0, "vector_layers": ()}
                ),
            ),
            "no task",
        ),
    ],
)
def test_what_does_not_compare_is_refused(changed, said):
    with pytest.raises(TrainingError, match=said):
        frontiers([TEACHER, changed])


def test_a_set_of_one_s_own_is_drawn_by_the_metric_that_it_has():
    (found,) = frontiers([manifest("new", variant("rowwise", 8, 66.0, 0.1, metric="accuracy"))])
    assert found.headline.metric == "accuracy"
    with pytest.raises(TrainingError, match="new: its variants have no scores"):
        frontiers([manifest("new", variant("rowwise", 8, 66.0, 0.1).model_copy(update={"scores": ()}))])


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "teacher").mkdir()
    write_manifest(tmp_path / "teacher", TEACHER)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        run_frontier([tmp_path / "teacher"], Path(tmp_path / "file" / "frontier.md"))
