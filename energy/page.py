"""A report as one HTML page with plots, which needs nothing from anywhere else. Knows nothing of ledgers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import jinja2

from energy.report import Group, Report
from energy.tables import figure, joules, moment, name_of, qualities
from energy.types import Phase, Quality

_HTML = Path(__file__).with_name("page.html")
_Kind = TypeVar("_Kind", bound=str)
_STEP_S = {"hour": 3600, "day": 86_400}


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a bar: where it begins and how long it is, in percent of the plot's width."""

    kind: str
    start: float
    length: float
    title: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of a plot."""

    name: str
    segments: tuple[Segment, ...]
    value: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Horizontal bars below each other, and the kinds of their segments."""

    title: str
    note: str
    kinds: tuple[str, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """Energy of an hour or a day, in percent of the plot's width and height."""

    start: float
    width: float
    active: float
    idle: float
    title: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """Energy over time."""

    unit: str
    columns: tuple[Column, ...]
    highest: str
    first: str
    last: str


def as_html(report: Report, timeline: Report) -> str:
    """The page; ``timeline`` is the report over the same time by hour or day."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=figure, joules=joules, name_of=name_of, qualities=qualities)
    template = environment.from_string(_HTML.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        span=f"{moment(report.since_s)} to {moment(report.until_s)} (UTC)",
        timeline=_timeline(timeline),
        plots=[] if report.by in _STEP_S else list(_plots(report)),
    )


def _plots(report: Report) -> Iterable[Plot]:
    known = [group for group in report.groups if group.allocated_uj is not None]
    most_uj = max((group.allocated_uj or 0 for group in known), default=0)
    yield Plot(
        f"Energy by {report.by}",
        "Active energy is above idle; the rest is the share of the idle machine.",
        ("active", "idle share"),
        tuple(Bar(name_of(group), _stack(_halves(group), most_uj), f"{_j(group.allocated_uj)} J") for group in known),
    )
    answered = [group for group in known if group.query_mean_uj is not None]
    highest_uj = max((max(group.query_p95_uj or 0, group.query_mean_uj or 0) for group in answered), default=0)
    yield Plot(
        "Joules per query",
        "Bar: from the median to the 95th percentile; mark: the mean.",
        ("p50 to p95", "mean"),
        tuple(Bar(name_of(group), _spread(group, highest_uj), f"{_j(group.query_mean_uj)} J") for group in answered),
    )
    yield Plot(
        "Where it went",
        "Allocated energy by phase.",
        tuple(phase for phase in Phase if phase in report.total.phases),
        tuple(_shares(group, group.phases) for group in known if group.phases),
    )
    yield Plot(
        "On which device",
        "Allocated energy by device.",
        tuple(sorted(report.total.devices)),
        tuple(_shares(group, group.devices) for group in known if group.devices),
    )
    yield Plot(
        "How far to trust it",
        "Requests by the quality of their bill.",
        tuple(quality for quality in Quality if report.total.quality[quality]),
        tuple(
            Bar(name_of(group), _stack(group.quality, group.requests), f"{group.requests:,}")
            for group in report.groups
        ),
    )


def _halves(group: Group) -> dict[str, int]:
    active_uj, allocated_uj = group.active_uj or 0, group.allocated_uj or 0
    return {"active": active_uj, "idle share": allocated_uj - active_uj}


def _shares(group: Group, parts: Mapping[_Kind, int]) -> Bar:
    return Bar(name_of(group), _stack(parts, sum(parts.values())), f"{_j(sum(parts.values()))} J")


def _stack(parts: Mapping[_Kind, int], whole: float) -> tuple[Segment, ...]:
    """Segments one after the other; a plot of nothing has none."""
    segments, start = [], 0.0
    for kind, part in parts.items():
        if part:
            length = 100 * part / whole
            segments.append(Segment(kind, start, length, f"{kind}: {part / sum(parts.values()):.1%}"))
            start += length
    return tuple(segments)


def _spread(group: Group, whole_uj: float) -> tuple[Segment, ...]:
    p50_uj, p95_uj, mean_uj = group.query_p50_uj or 0, group.query_p95_uj or 0, group.query_mean_uj or 0.0
    if not whole_uj:
        return ()
    scale = 100 / whole_uj
    title = f"median {_j(p50_uj)} J, 95th percentile {_j(p95_uj)} J"
    return (
        # Never so thin that it cannot be seen.
        Segment("p50 to p95", min(p50_uj * scale, 99), max((p95_uj - p50_uj) * scale, 1), title),
        Segment("mean", min(mean_uj * scale, 99.2), 0.8, f"mean {_j(mean_uj)} J"),
    )


def _timeline(report: Report) -> Timeline | None:
    """None without any energy that is known."""
    found = [(_begin_s(group), group) for group in report.groups if group.allocated_uj]
    if not found:
        return None
    step_s = _STEP_S[report.by]
    # From the first to the last of them: a span may begin long before there was anything.
    start_s, end_s = found[0][0], found[-1][0] + step_s
    most_uj = max(group.allocated_uj or 0 for _, group in found)
    return Timeline(
        unit=report.by,
        columns=tuple(_column(group, at_s - start_s, step_s, end_s - start_s, most_uj) for at_s, group in found),
        highest=f"{_j(most_uj)} J",
        first=name_of(found[0][1]),
        last=name_of(found[-1][1]),
    )


def _column(group: Group, after_s: float, step_s: float, span_s: float, most_uj: int) -> Column:
    halves = _halves(group)
    return Column(
        start=100 * after_s / span_s,
        width=100 * step_s / span_s,
        active=100 * halves["active"] / most_uj,
        idle=100 * halves["idle share"] / most_uj,
        title=f"{name_of(group)}: {_j(group.allocated_uj)} J, {group.requests:,} requests",
    )


def _begin_s(group: Group) -> float:
    return datetime.fromisoformat(name_of(group)).replace(tzinfo=UTC).timestamp()


def _j(energy_uj: float | None) -> str:
    return figure(joules(energy_uj))
