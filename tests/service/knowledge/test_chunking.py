"""Passages reproduce their text letter by letter, cover all of it, and overlap in whole sentences."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sentences import split_sentences
from service.knowledge.chunking import OVERLAP_CHARACTERS, PASSAGE_CHARACTERS, split_passages

PIECES = st.sampled_from(
    [
        "A short one. ",
        "word " * 60 + "end. ",
        "x" * 700,
        "Dr. Who? ",
        "\n\n",
        "# Heading\n",
        "```\n",
        "\u3000",
        "e\u0301",
        "😀 ",
    ]
)
TEXT = st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=60).map("".join))


@given(text=TEXT, markdown=st.booleans())
def test_passages_cover_all_but_white_space_in_order(text: str, markdown: bool) -> None:
    passages = split_passages(text, markdown)
    assert all(0 <= start < end <= len(text) for start, end in passages)
    assert all(text[start:end].strip() == text[start:end] for start, end in passages)
    assert all(end - start <= PASSAGE_CHARACTERS for start, end in passages)
    for (start, end), (following, last) in pairwise(passages):
        assert start < following and end < last
        assert max(0, end - following) <= OVERLAP_CHARACTERS
    covered = {place for start, end in passages for place in range(start, end)}
    assert all(letter.isspace() for place, letter in enumerate(text) if place not in covered)


def test_a_passage_is_whole_sentences_and_neighbours_share_some() -> None:
    text = " ".join(f"Sentence number {n} says something of its own." for n in range(100))
    starts, ends = zip(*split_sentences(text), strict=True)
    passages = split_passages(text)
    assert len(passages) > 3
    assert {start for start, _ in passages} <= set(starts)
    assert {end for _, end in passages} <= set(ends)
    assert all(0 < end - following <= OVERLAP_CHARACTERS for (_, end), (following, _) in pairwise(passages))


def test_a_short_text_is_one_passage_and_an_empty_one_none() -> None:
    assert split_passages("  One. Two!\n") == [(2, 11)]
    assert split_passages(" \n") == []


def test_a_sentence_without_end_is_cut_at_white_space_or_anywhere() -> None:
    text = "word " * 1000
    assert all(text[start:end].startswith("word") for start, end in split_passages(text))
    assert [end - start for start, end in split_passages("x" * 3000)] == [1200, 1200, 600]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("# A\nOne.\n## B\nTwo.", ["# A\nOne.", "## B\nTwo."]),
        ("One.\n# B\nTwo.", ["One.", "# B\nTwo."]),
        ("# A\n```sh\n# no heading\n```\nOne.", ["# A\n```sh\n# no heading\n```\nOne."]),
        ("````\n```\n# no heading\n````\n# B", ["````\n```\n# no heading\n````", "# B"]),
        ("#hashtag\n#another", ["#hashtag\n#another"]),
    ],
)
def test_a_heading_of_markdown_begins_a_passage(text: str, wanted: list[str]) -> None:
    assert [text[start:end] for start, end in split_passages(text, markdown=True)] == wanted
    assert len(split_passages(text)) == 1
