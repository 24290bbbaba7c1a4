"""How far two sides' outputs agree: pure functions. Knows nothing of who wrote them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    """Between one side's outputs and the reference's, over the rows of a batch; 1 is the same."""

    mean: float
    least: float


def of_texts(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> Agreement:
    """Per text the share of its tokens before the first difference: what follows that reads another text.

    Raises ``ValueError`` where a text has another length than the reference, which was written to a fixed one.
    """
    shares = []
    for mine, reference in zip(ours, theirs, strict=True):
        if len(mine) != len(reference):
            raise ValueError(f"a text has {len(mine)} tokens and not {len(reference)}")
        same = next((n for n, (a, b) in enumerate(zip(mine, reference, strict=True)) if a != b), len(mine))
        shares.append(same / len(mine))
    return _over(shares)


def of_vectors(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Agreement:
    """Per row the cosine."""
    cosines = []
    for mine, reference in zip(ours, theirs, strict=True):
        dot = math.fsum(a * b for a, b in zip(mine, reference, strict=True))
        cosines.append(dot / (math.hypot(*mine) * math.hypot(*reference)))
    return _over(cosines)


def _over(values: Sequence[float]) -> Agreement:
    return Agreement(math.fsum(values) / len(values), min(values))
