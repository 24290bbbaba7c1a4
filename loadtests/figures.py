"""The arithmetic of a run: requests in, figures out. Knows nothing of HTTP, files or Locust.

A *query* is one text answered; a request holds one or several. Figures of energy are per query, from bills that are
known; what is not known is None, never zero.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from loadtests.samples import Sample

QUALITIES = ("measured", "apportioned", "estimated", "unavailable")
"""Best first; the weakest names the whole."""
WINDOWS = 24
"""Into which a run is cut to show how it changed with time and load."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution. Percentiles are linear between the nearest ranks."""

    mean: float
    p50: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """A run, or one task of it."""

    requests: int
    queries: int
    """Texts of answered requests."""
    failed: int
    without_bill: int
    """Answered, but nobody has said what they cost."""
    unsettled: int
    """Answered, but their bill was not final when the run was closed."""
    requests_per_s: float
    """Answered ones."""
    queries_per_s: float
    latency_ms: Spread | None
    """Of answered requests."""
    ttft_ms: Spread | None
    queue_ms: Spread | None
    active_j: Spread | None
    """Above idle, per query."""
    allocated_j: Spread | None
    """With its share of idle, per query."""
    active_j_per_output_token: float | None
    allocated_j_per_output_token: float | None
    gco2e_per_1000: float | None
    """Grams of CO2e of a thousand queries."""
    idle_share: float | None
    """Of the allocated energy."""
    quality: str | None
    """The weakest among the bills."""
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a run."""

    at_s: float
    """Its middle."""
    queries_per_s: float
    in_flight: float
    """Mean number of requests that were being answered."""
    failed: int
    p50_ms: float | None
    p95_ms: float | None
    active_j: float | None
    """Mean per query."""
    allocated_j: float | None


def figures(samples: Sequence[Sample], duration_s: float) -> Figures:
    """The figures of ``samples``, all of which were due within ``duration_s`` seconds (above 0)."""
    answered = [sample for sample in samples if sample.error is None]
    billed = [sample for sample in answered if sample.allocated_j is not None]
    with_active = [sample for sample in billed if sample.active_j is not None]
    queries = sum(sample.texts for sample in answered)
    return Figures(
        requests=len(samples),
        queries=queries,
        failed=len(samples) - len(answered),
        without_bill=len(answered) - len(billed),
        unsettled=sum(not sample.settled for sample in billed),
        requests_per_s=len(answered) / duration_s,
        queries_per_s=queries / duration_s,
        latency_ms=spread([sample.latency_ms for sample in answered]),
        ttft_ms=spread(_known(answered, lambda sample: sample.ttft_ms)),
        queue_ms=spread(_known(answered, lambda sample: sample.queue_ms)),
        active_j=spread(per_query(with_active, lambda sample: sample.active_j)),
        allocated_j=spread(per_query(billed, lambda sample: sample.allocated_j)),
        active_j_per_output_token=_per_token(with_active, lambda sample: sample.active_j),
        allocated_j_per_output_token=_per_token(billed, lambda sample: sample.allocated_j),
        gco2e_per_1000=_per_thousand(billed),
        idle_share=_idle_share(with_active),
        quality=_weakest(sample.quality for sample in billed),
        models=tuple(sorted({sample.model for sample in answered if sample.model})),
    )


def by_task(samples: Sequence[Sample], duration_s: float) -> dict[str, Figures]:
    """Figures of each task, in the order of their names."""
    names = sorted({sample.task for sample in samples})
    return {name: figures([sample for sample in samples if sample.task == name], duration_s) for name in names}


def windows(samples: Sequence[Sample], start_s: float, end_s: float, count: int = WINDOWS) -> list[Window]:
    """The run between two times in pieces of equal length, each with the requests that ended in it."""
    edges = np.linspace(start_s, end_s, count + 1)
    found = []
    for left, right in pairwise(map(float, edges)):
        ended = [sample for sample in samples if left <= _end_s(sample) < right]
        piece = figures(ended, right - left)
        busy_s = sum(max(0.0, min(_end_s(each), right) - max(each.at_s, left)) for each in samples)
        found.append(
            Window(
                at_s=(left + right) / 2,
                queries_per_s=piece.queries_per_s,
                in_flight=busy_s / (right - left),
                failed=piece.failed,
                p50_ms=part(piece.latency_ms, "p50"),
                p95_ms=part(piece.latency_ms, "p95"),
                active_j=part(piece.active_j, "mean"),
                allocated_j=part(piece.allocated_j, "mean"),
            )
        )
    return found


def drift(
    samples: Sequence[Sample], start_s: float, end_s: float, read: Callable[[Sample], float | None]
) -> float | None:
    """Mean of ``read`` in the last fifth of the run over that in the first; None where either has none."""
    fifth_s = (end_s - start_s) / 5
    answered = [sample for sample in samples if sample.error is None]
    first = _known([each for each in answered if start_s <= each.at_s < start_s + fifth_s], read)
    last = _known([each for each in answered if end_s - fifth_s <= each.at_s < end_s], read)
    if not first or not last or not sum(first):
        return None
    return float(np.mean(last) / np.mean(first))


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and percentiles; None of nothing."""
    if not len(values):
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return Spread(float(np.mean(values)), float(p50), float(p95), float(p99))


def part(found: Spread | None, name: str) -> float | None:
    """``mean``, ``p50``, ``p95`` or ``p99`` of what may be unknown."""
    return None if found is None else float(getattr(found, name))


def per_query(samples: Iterable[Sample], read: Callable[[Sample], float | None]) -> list[float]:
    """One value for every text: a request's joules are shared equally by its texts."""
    return [
        value / sample.texts for sample in samples if (value := read(sample)) is not None for _ in range(sample.texts)
    ]


def as_dict(figure: Figures | Window) -> dict[str, Any]:
    """For JSON."""
    return asdict(figure)


def _known(samples: Iterable[Sample], read: Callable[[Sample], float | None]) -> list[float]:
    return [value for sample in samples if (value := read(sample)) is not None]


def _per_token(samples: Iterable[Sample], read: Callable[[Sample], float | None]) -> float | None:
    """Joules of the requests that wrote, over the tokens that they wrote."""
    writing = [sample for sample in samples if sample.output_tokens]
    tokens = sum(sample.output_tokens or 0 for sample in writing)
    return sum(_known(writing, read)) / tokens if tokens else None


def _per_thousand(samples: Iterable[Sample]) -> float | None:
    known = [sample for sample in samples if sample.gco2e is not None]
    queries = sum(sample.texts for sample in known)
    return 1000 * sum(sample.gco2e or 0.0 for sample in known) / queries if queries else None


def _idle_share(samples: Sequence[Sample]) -> float | None:
    allocated_j = sum(sample.allocated_j or 0.0 for sample in samples)
    return 1 - sum(sample.active_j or 0.0 for sample in samples) / allocated_j if allocated_j else None


def _weakest(qualities: Iterable[str | None]) -> str | None:
    found = set(qualities)
    return next((quality for quality in reversed(QUALITIES) if quality in found), None)


def _end_s(sample: Sample) -> float:
    return sample.at_s + sample.latency_ms / 1000
