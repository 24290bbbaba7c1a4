"""A text that is being written: what its rows read next, and when it ends. Knows nothing of graphs or buffers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.engine.beams import BeamSearch, log_softmax
from service.engine.sampling import choose, repeating_tokens
from service.engine.types import FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class Written:
    """A text that has ended."""

    ids: tuple[int, ...]
    finish_reason: FinishReason


class Text(Protocol):
    """A text in progress."""

    @property
    def next_ids(self) -> Sequence[int]:
        """What each of its rows reads next."""

    def advance(self, logits: NDArray[np.float32]) -> Written | list[int]:
        """Take the logits of its rows ``(rows, words)``: the whole text if it ends here, else the row that each of its
        rows continues, counted from 0."""


def begin(
    sampling: Sampling, max_tokens: int, eos: int | None, should_stop: Callable[[Sequence[int]], bool] | None
) -> Text:
    """A text of which nothing is written; ``max_tokens`` is the limit that holds."""
    if sampling.beams > 1:
        return BeamText(sampling, max_tokens, eos)
    return PlainText(sampling, max_tokens, eos, should_stop)


class PlainText:
    """Greedy or sampled: one row, one token at a time."""

    def __init__(
        self,
        sampling: Sampling,
        max_tokens: int,
        eos: int | None,
        should_stop: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        self._sampling, self._max_tokens, self._eos, self._should_stop = sampling, max_tokens, eos, should_stop
        # A generator of its own, so that neighbours in a batch draw nothing from it.
        self._random = np.random.default_rng(sampling.seed)
        self._ids: list[int] = []

    @property
    def next_ids(self) -> Sequence[int]:
        """See ``Text``."""
        return self._ids[-1:]

    def advance(self, logits: NDArray[np.float32]) -> Written | list[int]:
        """See ``Text``."""
        row = _without_repeats(logits, [self._ids], self._sampling.no_repeat_ngram)[0]
        token = choose(row, self._sampling, self._random)
        if token == self._eos:
            return Written(tuple(self._ids), "stop")
        self._ids.append(token)
        if self._should_stop is not None and self._should_stop(self._ids):
            return Written(tuple(self._ids), "stop")
        if len(self._ids) == self._max_tokens:
            return Written(tuple(self._ids), "length")
        return [0]


class BeamText:
    """Beam search: a row for each beam."""

    def __init__(self, sampling: Sampling, max_tokens: int, eos: int | None) -> None:
        self._no_repeat_ngram = sampling.no_repeat_ngram
        self._search = BeamSearch(sampling.beams, sampling.length_penalty, eos, max_tokens)

    @property
    def next_ids(self) -> Sequence[int]:
        """See ``Text``."""
        return [text[-1] for text in self._search.texts]

    def advance(self, logits: NDArray[np.float32]) -> Written | list[int]:
        """See ``Text``."""
        parents = self._search.advance(
            _without_repeats(log_softmax(logits), self._search.texts, self._no_repeat_ngram)
        )
        if not self._search.over:
            return parents
        best = self._search.best
        return Written(best.ids, "stop" if best.stopped else "length")


def _without_repeats(logits: NDArray[np.float32], texts: Sequence[Sequence[int]], size: int) -> NDArray[np.float32]:
    """Rule out what would repeat an n-gram of ``size`` tokens in its row's text."""
    banned = [repeating_tokens(text, size) for text in texts]
    if not any(banned):
        return logits
    logits = logits.copy()
    for row, tokens in zip(logits, banned, strict=True):
        row[tokens] = -np.inf
    return logits
