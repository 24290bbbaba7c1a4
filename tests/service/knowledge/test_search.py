"""Whatever is typed is looked for and never obeyed; fused rankings are the sum of their reciprocal ranks."""

import sqlite3
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.knowledge.search import FUSION_CONSTANT, fuse, match_expression


@pytest.fixture(scope="module")
def index() -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE VIRTUAL TABLE terms USING fts5 (text, content='', tokenize='porter unicode61')")
    database.execute("INSERT INTO terms (rowid, text) VALUES (1, 'The Danube rises in the Black Forest')")
    database.execute("INSERT INTO terms (rowid, text) VALUES (2, 'To be or not to be, near U.S. rivers')")
    yield database
    database.close()


def matches(index: sqlite3.Connection, question: str) -> list[int]:
    expression = match_expression(question)
    if expression is None:
        return []
    return [
        row for (row,) in index.execute("SELECT rowid FROM terms WHERE terms MATCH ? ORDER BY rowid", (expression,))
    ]


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("Where does the Danube rise?", '"danube" OR "rise"'),
        ("What is the Danube's length? The DANUBE!", '"danube" OR "length"'),
        ("who is who", '"who" OR "is"'),
        ("the U.S. rivers", '"u.s" OR "rivers"'),
        ('a "b" AND c*', '"b" OR "c"'),
        ("?! …", None),
        ("", None),
    ],
)
def test_a_question_becomes_its_content_words(question: str, expression: str | None) -> None:
    assert match_expression(question) == expression


@pytest.mark.parametrize(
    "question",
    [
        'danube" OR text:forest NEAR("',
        "danube*) OR (",
        "{text} : danube",
        'x"y danube',
        "danube\x00forest",
        "NOT danube",
        "^danube + forest",
        '""" danube',
    ],
)
def test_operators_are_words_like_others(index: sqlite3.Connection, question: str) -> None:
    assert 1 in matches(index, question)


@given(st.text(max_size=40))
def test_no_text_is_a_syntax_error(index: sqlite3.Connection, question: str) -> None:
    matches(index, question.encode("utf-8", "replace").decode())


def test_stopwords_are_looked_for_where_there_is_nothing_else(index: sqlite3.Connection) -> None:
    assert matches(index, "To be, or not to be?") == [2]
    assert matches(index, "What are the U.S. ones?") == [2]


@given(st.lists(st.lists(st.integers(1, 30), unique=True, max_size=20), min_size=1, max_size=3))
def test_fusion_sums_reciprocal_ranks(rankings: list[list[int]]) -> None:
    fused = fuse(rankings)
    scores = dict(fused)
    assert len(scores) == len(fused)
    assert scores.keys() == {passage for ranking in rankings for passage in ranking}
    for passage, score in fused:
        wanted = sum(1 / (FUSION_CONSTANT + ranking.index(passage) + 1) for ranking in rankings if passage in ranking)
        assert score == pytest.approx(wanted)
    assert [score for _, score in fused] == sorted(scores.values(), reverse=True)
    assert [passage for passage, _ in fuse(rankings[:1])] == rankings[0]


def test_agreement_beats_a_single_first_place() -> None:
    assert [passage for passage, _ in fuse([[1, 2, 3], [4, 2, 5]])] == [2, 1, 4, 3, 5]
