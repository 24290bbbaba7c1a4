"""Uncased WordPiece text becomes prose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.prose import Restorer

SOURCE = (
    "Alice M\u00fcller met #Person1# in the U.S., at J.P. Morgan's well-known bank. They don't like \"iPhone\" prices "
    "of $3,500.50. The CEO said so at 10:30. NATO agreed, and the weather changed."
)


def restore(text: str, source: str) -> str:
    return Restorer(source).restore(text)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (
            "alice muller met # person1 # in the u . s . and left .",
            "Alice M\u00fcller met #Person1# in the U.S. and left.",
        ),
        ("the ceo paid $ 3 , 500 . 50 at 10 : 30 .", "The CEO paid $3,500.50 at 10:30."),
        ("they don ' t . it isn ' t , either .", "They don't. It isn't, either."),
        ("j . p . morgan ' s well - known iphone", "J.P. Morgan's well-known iPhone"),
        ('he said " yes , we can " and left ( early ) ?', 'He said "yes, we can" and left (early)?'),
        ("it cost 1 , 200 . 75 - twice", "It cost 1,200.75-twice"),
        ("nato and the weather . the weather !", "NATO and the weather. The weather!"),
        ("# person1 # ' s bank", "#Person1#'s bank"),
        ("", ""),
        ("...", "..."),
    ],
)
def test_spacing_and_capitals_come_back(written: str, expected: str) -> None:
    assert restore(written, SOURCE) == expected


def test_a_speaker_has_a_name_and_what_follows_begins_a_sentence() -> None:
    source = "Tom: The class ends late.\nAnna: The notes are here."
    assert restore("anna told tom that the notes are here .", source) == "Anna told Tom that the notes are here."


@given(st.text(max_size=80), st.text(max_size=200))
def test_any_text_comes_back_with_its_letters(written: str, source: str) -> None:
    def letters(text: str) -> int:
        return sum(letter.isascii() and letter.isalnum() for letter in text)

    assert letters(restore(written, "")) >= letters(written.lower())
    restore(written, source)


# What makes words, spacing and sentences hang together, and little else.
PIECES = [
    "a",
    "b",
    "ab",
    "u",
    "s",
    "t",
    "no",
    "mr",
    "3",
    "10",
    ".",
    ",",
    ":",
    "!",
    "?",
    "'",
    '"',
    "-",
    "$",
    "(",
    ")",
    "#",
    "ß",
]
PIECES += ["。", "_", "é"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=24).map(" ".join)
SOURCES = st.lists(st.sampled_from([*PIECES, "U.S.", "a-b", "Mr.", "B", "#A#", "3.10"]), max_size=12).map(" ".join)


@settings(max_examples=500)
@given(TEXTS, SOURCES)
def test_what_is_certain_stays_whatever_follows(written: str, source: str) -> None:
    restorer = Restorer(source)
    whole, before = restorer.restore(written), ""
    for length in range(len(written) + 1):
        certain = restorer.certain(written[:length])
        assert whole.startswith(certain)
        assert certain.startswith(before)
        before = certain


def test_prose_is_certain_a_few_words_late() -> None:
    restorer = Restorer(SOURCE)
    written = "alice muller met # person1 # in the u . s . and left because they don ' t agree"
    assert restorer.certain(written) == "Alice Müller met #Person1# in the U.S. and left because they"
    assert restorer.certain('alice said yes and " no " to them all') == "Alice said yes"
