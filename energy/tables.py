"""A report as text for a terminal, as CSV and as Parquet. Knows nothing of ledgers.

Files hold one line per group in base units; what is unknown is empty. No total, which a reader would count twice.
"""

import csv
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from energy.report import Group, Report
from energy.types import Phase, Quality

UJ_PER_J = 1e6
Value = str | int | float | None


class MissingPackage(Exception):
    """A format needs a package that is not installed; the message says which."""


def as_text(report: Report) -> str:
    """The table and its total, and which time it is of."""
    span = f"Requests that ended from {moment(report.since_s)} to {moment(report.until_s)} (UTC), by {report.by}"
    if not report.groups:
        return f"{span}: none."
    heads = (report.by, "requests", "tokens in", "tokens out", "active J", "allocated J", "J/query", "p50", "p95")
    rows: list[tuple[str, ...]] = [(*heads, "J/token out", "gCO2e", "quality")]
    rows += [_cells(group) for group in (*report.groups, report.total)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if 0 < i < len(row) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join((span, "", *lines))


def write_csv(report: Report, path: Path) -> None:
    """One line per group below a line of names. Raises ``OSError``."""
    rows = _records(report)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _types(report))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(report: Report, path: Path) -> None:
    """One row per group. Raises ``MissingPackage`` without pyarrow, and ``OSError``."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingPackage("pyarrow is not installed; it comes with the extra [report]") from None
    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in _types(report).items()])
    parquet.write_table(pyarrow.Table.from_pylist(_records(report), schema), path)


def moment(time_s: float) -> str:
    """Seconds since 1970 as ``2026-11-24 10:00``, UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")


def figure(value: float | None) -> str:
    """Four digits for a person; a dash for what is unknown."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def joules(energy_uj: float | None) -> float | None:
    """Microjoules in joules; unknown stays unknown."""
    return None if energy_uj is None else energy_uj / UJ_PER_J


def qualities(group: Group) -> str:
    """The qualities of a group's bills in words, best first."""
    shares = group.quality_shares
    if 1 in shares.values():
        return next(quality for quality, share in shares.items() if share == 1)
    return ", ".join(f"{quality} {share:.1%}" for quality, share in shares.items() if share)


def name_of(group: Group) -> str:
    """A group's name; requests without a key have none."""
    return "(none)" if group.name is None else group.name


def _cells(group: Group) -> tuple[str, ...]:
    return (
        name_of(group),
        f"{group.requests:,}",
        f"{group.input_tokens:,}",
        f"{group.output_tokens:,}",
        figure(joules(group.active_uj)),
        figure(joules(group.allocated_uj)),
        figure(joules(group.query_mean_uj)),
        figure(joules(group.query_p50_uj)),
        figure(joules(group.query_p95_uj)),
        figure(joules(group.output_token_uj)),
        figure(group.gco2e),
        qualities(group),
    )


def _types(report: Report) -> dict[str, type]:
    """The columns of the files."""
    counts = ("requests", "answered", "input_tokens", "output_tokens")
    energies = ("active_j", "allocated_j", "j_per_query_mean", "j_per_query_p50", "j_per_query_p95")
    figures = (*energies, "j_per_output_token", "gco2e", *(f"share_{quality}" for quality in Quality))
    parts = (*(f"phase_{phase}_j" for phase in Phase), *(f"device_{name}_j" for name in sorted(report.total.devices)))
    return {report.by: str, **dict.fromkeys(counts, int), **dict.fromkeys((*figures, *parts), float)}


def _records(report: Report) -> list[Mapping[str, Value]]:
    return [_record(report, group) for group in report.groups]


def _record(report: Report, group: Group) -> dict[str, Value]:
    return {
        report.by: group.name,
        "requests": group.requests,
        "answered": group.answered,
        "input_tokens": group.input_tokens,
        "output_tokens": group.output_tokens,
        "active_j": joules(group.active_uj),
        "allocated_j": joules(group.allocated_uj),
        "j_per_query_mean": joules(group.query_mean_uj),
        "j_per_query_p50": joules(group.query_p50_uj),
        "j_per_query_p95": joules(group.query_p95_uj),
        "j_per_output_token": joules(group.output_token_uj),
        "gco2e": group.gco2e,
        **{f"share_{quality}": share for quality, share in group.quality_shares.items()},
        **{f"phase_{phase}_j": joules(group.phases.get(phase)) for phase in Phase},
        **{f"device_{name}_j": joules(group.devices.get(name)) for name in sorted(report.total.devices)},
    }
