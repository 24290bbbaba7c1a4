"""Cuts a document into passages: runs of whole sentences that overlap. Knows nothing of models or storage."""

import re
from collections.abc import Iterator
from itertools import pairwise

from models.sentences import split_sentences

PASSAGE_CHARACTERS = 1200
"""The longest passage: about 270 tokens of English, which a reader of 384 takes whole beside its question."""
OVERLAP_CHARACTERS = 200
"""The most that neighbours share, in whole sentences: what an answer needs seldom reaches further back."""

_HEADING = re.compile(r" {0,3}#{1,6}(?:\s|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")


def split_passages(text: str, markdown: bool = False) -> list[tuple[int, int]]:
    """Character offsets ``(start, end)`` of each passage, in order; together they leave out nothing but white space.

    In Markdown a heading begins a new passage, which shares nothing with the one before.
    """
    edges = [0, *(_headings(text) if markdown else ()), len(text)]
    return [passage for start, end in pairwise(edges) for passage in _pack(list(_pieces(text, start, end)))]


def _pack(pieces: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Fill passages with neighbouring pieces; each begins with those that still fit from the end of the last."""
    first = 0
    for number, (_, end) in enumerate(pieces):
        if end - pieces[first][0] <= PASSAGE_CHARACTERS:
            continue
        reach = pieces[number - 1][1]
        yield pieces[first][0], reach
        while first < number and (
            reach - pieces[first][0] > OVERLAP_CHARACTERS or end - pieces[first][0] > PASSAGE_CHARACTERS
        ):
            first += 1
    if pieces:
        yield pieces[first][0], pieces[-1][1]


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The sentences between two offsets; one longer than a passage in parts, cut at white space if it has any."""
    for first, last in split_sentences(text[start:end]):
        first, last = start + first, start + last
        while last - first > PASSAGE_CHARACTERS:
            space = _LAST_SPACE.search(text, first + 1, first + PASSAGE_CHARACTERS + 1)
            cut = space.start() if space else first + PASSAGE_CHARACTERS
            yield first, cut
            first = cut
            while text[first].isspace():
                first += 1
        yield first, last


def _headings(text: str) -> Iterator[int]:
    """Where the lines that are headings begin; in a fenced block of code, none are."""
    fence = ""
    start = 0
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif not fence and start and _HEADING.match(line):
            yield start
        start += len(line)
