"""The spans of a text as a reader scores them, window by window. Knows nothing of questions or requests."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRIDE = 128
"""Context tokens that neighbouring windows share."""
MAX_ANSWER_TOKENS = 30


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a context as one sequence for the model."""

    first: int
    """Number of its first token in the context."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A question and its context, tokenised and cut into windows."""

    context: str
    offsets: Sequence[tuple[int, int]]
    """Characters of each token of the context."""
    context_starts: int
    """Position of the context's first token in every window."""
    windows: tuple[Window, ...]

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """Where the tokens from ``first`` to ``last`` stand in the context."""
        return _whole_characters(self.context, self.offsets[first][0], self.offsets[last][1])


def split_windows(tokens: int, room: int) -> Iterator[Window]:
    """Cover ``tokens`` of context by windows of ``room``, of which neighbours share ``STRIDE`` (at most half)."""
    step = room - min(STRIDE, room // 2)
    first = 0
    while first + room < tokens:
        yield Window(first, room)
        first += step
    yield Window(first, tokens - first)


def score_spans(reading: Reading, logits: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float64], float]:
    """``(tokens, MAX_ANSWER_TOKENS)``: at [i, d] the score of the span from token i to i + d, the best of the windows
    that hold it; and the score of 'no answer'."""
    spans = np.full((len(reading.offsets), MAX_ANSWER_TOKENS), -np.inf)
    null = np.inf
    for window, scores in zip(reading.windows, logits, strict=True):
        null = min(null, float(scores[0, 0]) + float(scores[0, 1]))
        here = scores[reading.context_starts : reading.context_starts + window.tokens].astype(np.float64)
        for length in range(min(MAX_ANSWER_TOKENS, window.tokens)):
            rows = window.tokens - length
            column = spans[window.first : window.first + rows, length]
            np.maximum(column, here[:rows, 0] + here[length:, 1], out=column)
    return spans, null


def share(score: float, spans: Sequence[NDArray[np.float64]], null: float) -> float:
    """The softmax of ``score`` among all ``spans`` and 'no answer'."""
    top = max(null, *(float(each.max()) for each in spans))
    total = float(sum(np.exp(each - top).sum() for each in spans) + np.exp(null - top))
    return float(np.exp(score - top)) / total


def _whole_characters(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its edges, and with the marks that combine with its last letter."""
    while end < len(text) and (unicodedata.category(text[end])[0] == "M" or text[end] == "\u200d"):
        end += 1
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
