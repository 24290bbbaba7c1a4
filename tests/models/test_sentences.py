"""Sentences end where a reader would end them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained.", "We stayed in."],
        ["Really?!", "Yes.", "No!"],
        ["Mr. Smith met Dr. Jones in the U.S. in May.", "They paid $3.50 each."],
        ['"Stop!" he said.', "She didn't."],
        ["He left (at last).", "(She stayed.)", "[So they say.]"],
        ["J. Smith wrote it.", "J. R. R. Tolkien read it."],
        ["She waited... and waited.", "Nobody came…", "Then he did."],
        ["See No. 5 on p. 12.", "The answer was no.", "It still is."],
        ["1. Wash the rice.", "2. Boil it."],
        ["So did I.", "We all did."],
        ["e.g. this one is whole.", "That is another."],
        ["All is well etc. and so on.", "Over 3.5 million came."],
        ["“Why?” she asked.", "‘Because.’", "«Bien.»", "Enough."],
        ["What is it?", "42."],
        ["no capitals here.", "none here either!", "or here"],
    ],
    ids=lambda sentences: sentences[0],
)
@pytest.mark.parametrize("between", [" ", "\n", "  \n\n "], ids=repr)
def test_sentences_are_found_again(sentences: list[str], between: str) -> None:
    text = between.join(sentences)
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("A heading\n\nand its text", ["A heading", "and its text"]),
        ("#Person1#: Hi!\n#Person2#: Hello", ["#Person1#: Hi!", "#Person2#: Hello"]),
        ("A line that was\nwrapped. Another one.", ["A line that was\nwrapped.", "Another one."]),
        ("今日は。元気？はい", ["今日は。", "元気？", "はい"]),
        ("Version 2.0.1 is at example.com/a.b now.", ["Version 2.0.1 is at example.com/a.b now."]),
        ("...", ["..."]),
    ],
)
def test_what_looks_like_an_end_and_what_is_one(text: str, expected: list[str]) -> None:
    assert [text[start:end] for start, end in split_sentences(text)] == expected


@given(st.text(alphabet=st.one_of(st.sampled_from(" .!?\n\"')A1a。"), st.characters()), max_size=200))
def test_nothing_but_white_space_is_left_out(text: str) -> None:
    spans = split_sentences(text)
    assert all(start < end and text[start:end] == text[start:end].strip() for start, end in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    covered = "".join(text[start:end] for start, end in spans)
    assert "".join(covered.split()) == "".join(text.split())


def test_a_long_text_takes_no_time_to_speak_of() -> None:
    assert len(split_sentences("It rained. " * 10_000)) == 10_000
    assert len(split_sentences("." * 200_000)) == 1
