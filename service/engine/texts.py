"""A text that is written one token at a time, and when it ends. Knows nothing of graphs or buffers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.sampling import Repeats, choose
from service.engine.types import FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class Written:
    """A text that has ended."""

    ids: tuple[int, ...]
    finish_reason: FinishReason


class Text:
    """Greedy or sampled: one row, one token at a time."""

    def __init__(
        self,
        sampling: Sampling,
        max_tokens: int,
        eos: int | None,
        should_stop: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        self._sampling, self._max_tokens, self._eos, self._should_stop = sampling, max_tokens, eos, should_stop
        self._repeats = Repeats(sampling.no_repeat_ngram) if sampling.no_repeat_ngram else None
        # A generator of its own, so that neighbours in a batch draw nothing from it.
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None
        self._ids: list[int] = []

    def choose(self, logits: NDArray[np.float32], likeliest: int) -> int:
        """The next token, by the logits ``(words,)`` of its row; ``likeliest`` is where they are highest."""
        if self._repeats is not None and (banned := self._repeats.after(self._ids)):
            logits = logits.copy()
            logits[banned] = -np.inf
            likeliest = int(logits.argmax())
        if self._random is not None:
            return choose(logits, self._sampling, self._random)
        return likeliest

    def take(self, token: int) -> Written | None:
        """Write ``token``; returns the whole text if it ends here."""
        ids = self._ids
        if token == self._eos:
            return Written(tuple(ids), "stop")
        ids.append(token)
        if self._should_stop is not None and self._should_stop(ids):
            return Written(tuple(ids), "stop")
        if len(ids) == self._max_tokens:
            return Written(tuple(ids), "length")
        return None
