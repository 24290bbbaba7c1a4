"""Which token comes next, given the logits of one row: pure functions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.engine.types import Sampling


def repeating_tokens(ids: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of ``size`` tokens of ``ids``; none for size 0."""
    if size == 0 or len(ids) < size:
        return []
    tail = tuple(ids[len(ids) - size + 1 :])
    return [ids[i + size - 1] for i in range(len(ids) - size + 1) if tuple(ids[i : i + size - 1]) == tail]


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token of a row ``(words,)``: the likeliest at temperature 0, else drawn with one number of ``random``.

    Temperature first, then ``top_k``, then ``top_p`` (Holtzman et al. 2020) of what is left.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    # Likeliest first; a stable sort, so that ties fall the same way in every batch.
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulated = np.cumsum(weights)
    # The nucleus ends with the token that reaches top_p.
    kept = int(np.searchsorted(cumulated, sampling.top_p * cumulated[-1])) + 1
    end = cumulated[min(kept, len(cumulated)) - 1]
    place = int(np.searchsorted(cumulated, random.random() * end, side="right"))
    return int(order[min(place, kept - 1, len(order) - 1)])
