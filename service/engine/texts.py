"""A text that is written one token at a time, and when it ends. Knows nothing of graphs or buffers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.engine.sampling import Repeats, choose, token_logprobs
from service.engine.types import FinishReason, TokenLogprobs, WriteItem


@dataclass(frozen=True, slots=True)
class Written:
    """A text that has ended."""

    ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


class Text:
    """Greedy or sampled: one row, one token at a time."""

    def __init__(self, item: WriteItem, max_tokens: int, eos: int | None) -> None:
        """``max_tokens`` is the limit that holds."""
        self._item, self._max_tokens, self._eos = item, max_tokens, eos
        self._sampling = sampling = item.sampling
        self.should_stop = item.should_stop
        self._repeats = Repeats(sampling.no_repeat_ngram) if sampling.no_repeat_ngram else None
        # A generator of its own, so that neighbours in a batch draw nothing from it.
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature else None
        self.is_plain = (
            not sampling.temperature
            and not sampling.no_repeat_ngram
            and sampling.logprobs is None
            and item.should_stop is None
            and item.on_tokens is None
        )
        """Whether it always takes the likeliest token, and nobody follows it."""
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def choose(self, logits: NDArray[np.float32], likeliest: int) -> int:
        """The next token, by the logits ``(words,)`` of its row; ``likeliest`` is where they are highest."""
        allowed = logits
        if self._repeats is not None and (banned := self._repeats.after(self._ids)):
            allowed = logits.copy()
            allowed[banned] = -np.inf
            likeliest = int(allowed.argmax())
        token = likeliest if self._random is None else choose(allowed, self._sampling, self._random)
        if self._sampling.logprobs is not None and token != self._eos:
            self._logprobs.append(token_logprobs(logits, token, self._sampling.logprobs))
        return token

    def take(self, token: int) -> Written | None:
        """Write ``token``; returns the whole text if it ends here."""
        ids = self._ids
        if token == self._eos:
            return self._end("stop")
        ids.append(token)
        if self.is_plain:
            return self._end("length") if len(ids) == self._max_tokens else None
        if self._item.on_tokens is not None:
            self._item.on_tokens(ids)
        if self.should_stop is not None and (reason := self.should_stop(ids)):
            return self._end("stop" if reason is True else reason)
        if len(ids) == self._max_tokens:
            return self._end("length")
        return None

    def _end(self, finish_reason: FinishReason) -> Written:
        return Written(tuple(self._ids), finish_reason, tuple(self._logprobs))
