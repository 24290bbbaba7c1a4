"""Medians, spreads and ratios of recorded samples: pure functions. Knows nothing of how they are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

COSINE_TOLERANCE = 0.002
TEXT_TOLERANCE = 0.05
"""By how much a rival's agreement with the reference may be below ours and still count as equal."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some samples."""

    median: float
    least: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Raises ``ValueError`` for none."""
    return Spread(median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contender reached on one workload."""

    peer: str
    speed: Spread
    """Per second: the more the better."""
    agreement: float


@dataclass(frozen=True, slots=True)
class Ratios:
    """Ours over the best peer's median; None where there is no such peer."""

    to_best: float | None
    to_best_equal: float | None
    """Among those that agree with the reference no less than we do."""


def ratios(ours: Figure, others: Sequence[Figure], tolerance: float) -> Ratios:
    """How ``ours`` compares with figures of other peers."""
    rivals = [other for other in others if other.peer != ours.peer]
    equal = [rival for rival in rivals if rival.agreement >= ours.agreement - tolerance]
    return Ratios(_ratio(ours, rivals), _ratio(ours, equal))


def _ratio(ours: Figure, rivals: Sequence[Figure]) -> float | None:
    return ours.speed.median / max(rival.speed.median for rival in rivals) if rivals else None


def same_share(ours: Mapping[str, str], theirs: Mapping[str, str]) -> float | None:
    """The share of equal answers to the questions that both were asked; None where there is none."""
    both = ours.keys() & theirs.keys()
    return sum(ours[each] == theirs[each] for each in both) / len(both) if both else None
