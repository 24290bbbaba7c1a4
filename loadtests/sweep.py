"""Many runs over a server's settings, and which of them nothing beats. Knows nothing of how a run is made."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from energy.charts import Series, plot
from energy.sheet import Line, Table, render
from loadtests.report import LIMITS, pick, shown


class BadSetting(ValueError):
    """A setting that cannot be swept; the message says how to write one."""


@dataclass(frozen=True, slots=True)
class Point:
    """One setting and what came of it; None is what is not known."""

    settings: dict[str, str]
    queries_per_s: float
    p95_ms: float | None
    active_j: float | None
    """Mean per query."""
    allocated_j: float | None
    failed: int
    report: str
    """Folder of the run's own report."""
    error: str = ""
    """Why there was no run."""

    @property
    def name(self) -> str:
        """The settings in one line."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items()) or "defaults"

    @property
    def usable(self) -> bool:
        """Whether it can be judged: nothing failed and everything is known."""
        return not self.failed and None not in (self.p95_ms, self.allocated_j)


def read_settings(texts: Sequence[str]) -> dict[str, list[str]]:
    """``["threads=1,2", "models=a,b"]`` as lists of values. Raises ``BadSetting``."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        split = [value for value in values.split(",") if value]
        if not name or not split or name in found:
            raise BadSetting(f"--set {text!r}: write, for example, --set threads=1,2, each setting once")
        found[name.replace("-", "_")] = split
    return found


def grid(settings: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination."""
    return [dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())]


def read_point(settings: dict[str, str], found: Mapping[str, Any], report: str) -> Point:
    """One run's document as a point."""
    total = found["total"]
    return Point(
        settings=settings,
        queries_per_s=total["queries_per_s"],
        p95_ms=pick(total, "latency_ms.p95"),
        active_j=pick(total, "active_j.mean"),
        allocated_j=pick(total, "allocated_j.mean"),
        failed=total["failed"],
        report=report,
    )


def failed_point(settings: dict[str, str], error: str) -> Point:
    """A setting with which there was no run."""
    return Point(settings, 0.0, None, None, None, 0, "", error)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The usable points that no other one beats or equals in latency, throughput and joules at once, by joules."""
    usable = [point for point in points if point.usable]
    kept = [point for point in usable if not any(_beats(other, point) for other in usable)]
    return sorted(kept, key=_joules)


def cheapest(points: Sequence[Point], max_p95_ms: float) -> Point | None:
    """The usable point with the fewest joules per query that keeps the latency; None where none does."""
    keeping = [point for point in points if point.usable and (point.p95_ms or 0.0) <= max_p95_ms]
    return min(keeping, key=_joules, default=None)


def verdict(points: Sequence[Point], max_p95_ms: float | None) -> Line:
    """Which setting to take."""
    if not any(point.usable for point in points):
        return Line("No setting can be judged: requests failed, or joules are unknown.", bad=True)
    limit = float("inf") if max_p95_ms is None else max_p95_ms
    best = cheapest(points, limit)
    kept = "" if max_p95_ms is None else f" with p95 within {max_p95_ms:g} ms"
    if best is None:
        return Line(f"No setting answers{kept}.", bad=True)
    return Line(f"Fewest joules{kept}: {best.name} ({shown(best.allocated_j)} J/query, p95 {shown(best.p95_ms)} ms).")


def table(points: Sequence[Point], max_p95_ms: float | None) -> Table:
    """All points, those on the frontier marked."""
    best = frontier(points)
    rows = [
        [
            point.name,
            *map(shown, (point.queries_per_s, point.p95_ms, point.active_j, point.allocated_j, point.failed)),
            "*" if point in best else "",
        ]
        for point in points
    ]
    head = ["setting", "queries/s", "p95 ms", "active J/query", "allocated J/query", "failed", "frontier"]
    lost = [Line(f"{point.name}: {point.error}", bad=True) for point in points if point.error]
    return Table("Settings", head, rows, [*lost, verdict(points, max_p95_ms)])


def as_html(title: str, subtitle: str, points: Sequence[Point], max_p95_ms: float | None) -> str:
    """One page with the frontier drawn."""
    best = frontier(points)
    plots = [
        ("Joules against latency", _plot(points, best, "p95_ms", "p95 ms")),
        ("Joules against throughput", _plot(points, best, "queries_per_s", "queries/s")),
    ]
    return render(title, subtitle, [], [table(points, max_p95_ms)], plots, LIMITS)


def as_document(points: Sequence[Point], max_p95_ms: float | None) -> dict[str, Any]:
    """For JSON."""
    best = None if max_p95_ms is None else cheapest(points, max_p95_ms)
    return {
        "points": [asdict(point) for point in points],
        "frontier": [point.settings for point in frontier(points)],
        "max_p95_ms": max_p95_ms,
        "cheapest": best.settings if best else None,
    }


def _plot(points: Sequence[Point], best: Sequence[Point], x: str, title: str) -> str:
    others = [point for point in points if point.usable and point not in best]
    series = [
        Series(
            name,
            [(getattr(point, x), point.allocated_j or 0.0) for point in group],
            css,
            labels=[point.name for point in group],
        )
        for name, group, css in (("frontier", best, "a"), ("others", others, "b"))
    ]
    return plot([each for each in series if each.points], title, "allocated J/query")


def _joules(point: Point) -> float:
    return point.allocated_j or 0.0


def _beats(one: Point, other: Point) -> bool:
    """Whether ``one`` is nowhere worse than ``other``, and somewhere better."""
    a, b = ((point.p95_ms or 0.0, -point.queries_per_s, _joules(point)) for point in (one, other))
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
