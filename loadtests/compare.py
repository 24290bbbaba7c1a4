"""Two runs held against each other: ratios with bootstrap confidence intervals. Reads reports, nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtests.figures import per_query
from loadtests.record import samples_of
from loadtests.samples import Sample

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCKS = 40
"""Requests that are close in time share batches and neighbours, so whole pieces of the run are drawn, not requests
(block bootstrap, Künsch 1989): this many pieces."""

Array = NDArray[np.float64]


class NotComparable(ValueError):
    """Runs whose ratio would mean nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of which less is better."""

    name: str
    read: Callable[[Sample], list[float]]
    percentile: float | None
    """None is the mean."""

    def of(self, blocks: Sequence[Array]) -> float:
        """The figure of all values in ``blocks``, of which there is at least one."""
        values = np.concatenate(blocks)
        return float(np.mean(values) if self.percentile is None else np.percentile(values, self.percentile))


@dataclass(frozen=True, slots=True)
class Ratio:
    """B over A of one metric of one task; above 1 is worse. None where a run has no such figure."""

    task: str
    metric: str
    a: float | None
    b: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    def regressed(self, allowed: float) -> bool:
        """Whether B is worse by more than ``allowed``, and not by chance; or has lost a figure that A has."""
        if self.b is None:
            return self.a is not None
        return self.ratio is not None and self.ratio > 1 + allowed and (self.low is None or self.low > 1)

    @property
    def says(self) -> str:
        """In words, what became of it."""
        return "is not known any more" if self.ratio is None else f"is {self.ratio:.3f} times what it was"


METRICS = (
    Metric("latency p50 (ms)", lambda sample: [sample.latency_ms], 50),
    Metric("latency p95 (ms)", lambda sample: [sample.latency_ms], 95),
    Metric("active J/query", lambda sample: per_query([sample], lambda each: each.active_j), None),
    Metric("allocated J/query", lambda sample: per_query([sample], lambda each: each.allocated_j), None),
)


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise ``NotComparable`` unless both runs had the same scenario: J/query changes several-fold with load."""
    ignored = ("description", "duration_s", "warm_up_s")
    different = [
        f"{name} {a['scenario'][name]} and {b['scenario'].get(name)}"
        for name in a["scenario"]
        if name not in ignored and a["scenario"][name] != b["scenario"].get(name)
    ]
    if different:
        raise NotComparable(f"the runs differ in their load, so their ratio says nothing: {'; '.join(different)}")
    for found, name in ((a, "first"), (b, "second")):
        if not found["total"]["queries"]:
            raise NotComparable(f"the {name} run has no answered request")


def compare(a: Mapping[str, Any], b: Mapping[str, Any], resamples: int = RESAMPLES) -> list[Ratio]:
    """Every metric of every task and of all together. Raises ``NotComparable``."""
    check_comparable(a, b)
    runs = [[sample for sample in samples_of(dict(found)) if sample.error is None] for found in (a, b)]
    tasks = sorted({sample.task for run in runs for sample in run})
    found = []
    for task in [*tasks, "total"]:
        first, second = ([each for each in run if task in (each.task, "total")] for run in runs)
        found += [_ratio(task, metric, first, second, resamples) for metric in METRICS]
    return [*found, *_metered(a, b)]


def _metered(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Ratio]:
    """Of servers without bills: this machine's meter over each run. One figure a run, so there is no interval."""
    if not a["metered"] or not b["metered"]:
        return []
    first, second = (found["metered"]["active_j_per_query"] for found in (a, b))
    return [Ratio("total", "metered active J/query", first, second, second / first if first and second else None)]


def _ratio(task: str, metric: Metric, a: Sequence[Sample], b: Sequence[Sample], resamples: int) -> Ratio:
    blocks = [_blocks(metric, run) for run in (a, b)]
    values = [metric.of(each) if each else None for each in blocks]
    if values[0] is None or values[1] is None or not values[0]:
        return Ratio(task, metric.name, values[0], values[1])
    chance = np.random.default_rng(0)  # the same reports always give the same intervals
    drawn = [_resample(metric, each, chance, resamples) for each in blocks]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn[1] / np.maximum(drawn[0], 1e-300), (tail, 100 - tail))
    return Ratio(task, metric.name, values[0], values[1], values[1] / values[0], float(low), float(high))


def _blocks(metric: Metric, samples: Sequence[Sample]) -> list[Array]:
    """The metric's values, in pieces of the run of equal length; empty pieces are left out."""
    if not samples:
        return []
    starts = np.array([sample.at_s for sample in samples])
    edges = np.linspace(starts.min(), starts.max(), BLOCKS + 1)[1:-1]
    pieces: list[list[float]] = [[] for _ in range(BLOCKS)]
    for sample, place in zip(samples, np.searchsorted(edges, starts, side="right"), strict=True):
        pieces[int(place)] += metric.read(sample)
    return [np.array(piece) for piece in pieces if piece]


def _resample(metric: Metric, blocks: Sequence[Array], chance: np.random.Generator, resamples: int) -> Array:
    draws = chance.integers(len(blocks), size=(resamples, len(blocks)))
    if metric.percentile is None:
        sums, counts = np.array([block.sum() for block in blocks]), np.array([len(block) for block in blocks])
        means: Array = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        return means
    return np.array([metric.of([blocks[place] for place in draw]) for draw in draws])


def rows(ratios: Sequence[Ratio], allowed: float) -> list[list[str]]:
    """For a terminal: what was compared, and what came out."""
    found = [["task", "metric", "A", "B", "B/A", f"{100 * CONFIDENCE:.0f}% interval", ""]]
    for each in ratios:
        numbers = ["-" if value is None else f"{value:.4g}" for value in (each.a, each.b)]
        interval = "-" if each.low is None or each.high is None else f"{each.low:.3f} to {each.high:.3f}"
        verdict = "" if not each.regressed(allowed) else "lost" if each.b is None else "worse"
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        found.append([each.task, each.metric, *numbers, ratio, interval, verdict])
    return found
