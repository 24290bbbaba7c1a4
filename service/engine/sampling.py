"""Which token comes next, given the logits of one row: pure functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.types import Sampling, TokenLogprobs


def repeating_tokens(ids: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of ``size`` tokens of ``ids``; none for size 0."""
    if size == 0 or len(ids) < size:
        return []
    tail = tuple(ids[len(ids) - size + 1 :])
    return [ids[i + size - 1] for i in range(len(ids) - size + 1) if tuple(ids[i : i + size - 1]) == tail]


class Repeats:
    """``repeating_tokens`` of one text that grows, without reading all of it again for each token."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._followers: dict[tuple[int, ...], list[int]] = {}
        """What has followed each run of ``size - 1`` tokens."""
        self._read = 0

    def after(self, ids: Sequence[int]) -> list[int]:
        """Tokens that would repeat an n-gram of ``ids``, which begin with those of the call before."""
        before = self._size - 1
        for end in range(max(self._read, before), len(ids)):
            self._followers.setdefault(tuple(ids[end - before : end]), []).append(ids[end])
        self._read = len(ids)
        if len(ids) < self._size:
            return []
        return self._followers.get(tuple(ids[len(ids) - before :]), [])


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token of a row ``(words,)``: the likeliest at temperature 0, else drawn with one number of ``random``.

    Temperature first, then ``top_k``, then ``top_p`` (Holtzman et al. 2020) of what is left.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    # As float32 a smaller temperature would be zero.
    weights = np.exp((logits - logits.max()) / np.float32(max(sampling.temperature, 1e-30)))
    tokens = None
    if 0 < sampling.top_k < len(weights):
        tokens = np.argpartition(-weights, sampling.top_k - 1)[: sampling.top_k]
        weights = weights[tokens]
    if sampling.top_p < 1:
        # However many tokens are lighter than this, together they weigh less than what top_p leaves out: they need
        # not be sorted.
        least = (1 - sampling.top_p) * weights.sum(dtype=np.float64) / len(weights)
        heavy = np.flatnonzero(weights >= least)
        heavy = heavy[np.argsort(-weights[heavy], kind="stable")]
        cumulated = np.cumsum(weights[heavy], dtype=np.float64)
        # The token that reaches top_p is the last one in.
        last = np.searchsorted(cumulated, sampling.top_p * weights.sum(dtype=np.float64))
        cumulated = cumulated[: last + 1]
        tokens = heavy if tokens is None else tokens[heavy]
    else:
        cumulated = np.cumsum(weights, dtype=np.float64)
    place = min(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"), len(cumulated) - 1)
    return int(place if tokens is None else tokens[place])


def token_logprobs(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """How likely ``token`` was by the ``logits`` of its row ``(words,)``, and the ``count`` likeliest ones."""
    logprobs = logits - logits.max()
    logprobs -= np.log(np.exp(logprobs).sum())
    best = np.argsort(-logprobs, kind="stable")[:count]
    return TokenLogprobs(float(logprobs[token]), tuple((int(each), float(logprobs[each])) for each in best))
