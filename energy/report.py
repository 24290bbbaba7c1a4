"""What the requests of a time cost, grouped: sums, means, percentiles over a ledger. Knows nothing of meters.

Sums are over every request whose bill is known, however it ended; figures per query are over those that were
answered. A figure that no request gives is None.
"""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from energy.ledger import open_to_read
from energy.types import Phase, Quality

Parts = Counter[tuple[str, str]]
"""Allocated energy by device and phase."""
Span = Mapping[str, float | str | None]
"""Which requests, as SQLite's named parameters."""
By = Literal["task", "model", "key", "hour", "day"]
_EXPRESSIONS: Mapping[str, str] = {
    "task": "task",
    "model": "model",
    "key": 'requests."key"',
    "hour": "strftime('%Y-%m-%dT%H:00Z', time_s, 'unixepoch')",
    "day": "strftime('%Y-%m-%d', time_s, 'unixepoch')",
}
_AGES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_KNOWN = "allocated_uj IS NOT NULL"
_ANSWERED = f"status = 'ok' AND {_KNOWN}"
_QUALITIES = ", ".join(f"count(*) FILTER (WHERE quality = '{quality}')" for quality in Quality)
_BETWEEN = 'time_s >= :since AND time_s < :until AND (:key IS NULL OR requests."key" = :key)'


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that have something in common. Energy in microjoules, or None where it is not known of any."""

    name: str | None
    """The task, model, key, or the hour or day (UTC) in which they ended; None for requests without a key."""
    requests: int
    answered: int
    input_tokens: int
    output_tokens: int
    active_uj: int | None
    allocated_uj: int | None
    gco2e: float | None
    query_mean_uj: float | None
    """Allocated energy per answered request; the percentiles are those of single requests."""
    query_p50_uj: int | None
    query_p95_uj: int | None
    output_token_uj: float | None
    """Allocated energy of the requests that wrote tokens, per token written."""
    quality: Mapping[Quality, int]
    """Requests by the quality of their bill."""
    phases: Mapping[Phase, int]
    """Allocated energy by phase and by device: of settled bills, and of others as far as readings cover them."""
    devices: Mapping[str, int]

    @property
    def quality_shares(self) -> dict[Quality, float]:
        """Share of the requests by the quality of their bill; empty without requests."""
        return {quality: count / self.requests for quality, count in self.quality.items()} if self.requests else {}


@dataclass(frozen=True, slots=True)
class Report:
    """The requests that ended from ``since_s`` until before ``until_s``, seconds since 1970 (UTC)."""

    by: By
    since_s: float
    until_s: float
    groups: tuple[Group, ...]
    total: Group


def read_moment(text: str, now_s: float) -> float:
    """Seconds since 1970 of an ISO 8601 date or time (UTC unless it says otherwise), or of ``24h``: so long ago.

    Ages are in s, m, h, d or w; nothing is before 1970. Raises ``ValueError``.
    """
    try:
        if text[-1:] in _AGES and text[:-1].isdecimal():
            return max(0.0, now_s - timedelta(**{_AGES[text[-1]]: int(text[:-1])}).total_seconds())
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        wanted = "an age such as 24h or 7d, or a time such as 2026-11-24T10:00Z"
        raise ValueError(f"must be {wanted}, not {text!r}") from None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def read_report(path: Path, since_s: float, until_s: float, by: By, key: str | None = None) -> Report:
    """The report over the ledger at ``path``, of ``key`` alone where one is named. Raises ``LedgerUnreadable``."""
    span: Span = {"since": since_s, "until": until_s, "key": key}
    with open_to_read(path) as database:
        # One snapshot, so that the parts add up.
        database.execute("BEGIN")
        parts = _parts(database, _EXPRESSIONS[by], span)
        groups = tuple(_groups(database, _EXPRESSIONS[by], span, parts))
        all_parts: dict[str | None, Parts] = {"total": sum(parts.values(), Counter())}
        (total,) = _groups(database, "'total'", span, all_parts) if groups else (_EMPTY,)
    return Report(by, since_s, until_s, groups, total)


_EMPTY = Group("total", 0, 0, 0, 0, None, None, None, None, None, None, None, dict.fromkeys(Quality, 0), {}, {})


def _groups(database: sqlite3.Connection, name: str, span: Span, parts: Mapping[str | None, Parts]) -> Iterator[Group]:
    """The groups that share the value of the expression ``name``, in its order."""
    percentiles = _percentiles(database, name, span)
    sums = f"""
        SELECT {name}, count(*), count(*) FILTER (WHERE status = 'ok'), sum(input_tokens), sum(output_tokens),
            sum(active_uj), sum(allocated_uj), sum(gco2e), avg(allocated_uj) FILTER (WHERE {_ANSWERED}),
            1.0 * sum(allocated_uj) FILTER (WHERE output_tokens > 0)
                / sum(output_tokens) FILTER (WHERE {_KNOWN} AND output_tokens > 0),
            {_QUALITIES}
        FROM requests WHERE {_BETWEEN} GROUP BY 1 ORDER BY 1
    """
    for row in database.execute(sums, span):
        group = row[0]
        p50, p95 = percentiles.get(group, (None, None))
        phases: Counter[str] = Counter()
        devices: Counter[str] = Counter()
        for (device, phase), energy_uj in parts.get(group, {}).items():
            phases[phase] += energy_uj
            devices[device] += energy_uj
        yield Group(
            name=group,
            requests=row[1],
            answered=row[2],
            input_tokens=row[3],
            output_tokens=row[4],
            active_uj=row[5],
            allocated_uj=row[6],
            gco2e=row[7],
            query_mean_uj=row[8],
            query_p50_uj=p50,
            query_p95_uj=p95,
            output_token_uj=row[9],
            quality=dict(zip(Quality, row[10:], strict=True)),
            phases={phase: phases[phase] for phase in Phase if phase in phases},
            devices=dict(sorted(devices.items())),
        )


def _percentiles(database: sqlite3.Connection, name: str, span: Span) -> dict[str | None, tuple[int, int]]:
    """Median and 95th percentile of the energy per answered request, by nearest rank: figures of real requests."""
    query = f"""
        WITH ranked AS (
            SELECT {name} AS name, allocated_uj, count(*) OVER (PARTITION BY {name}) AS n,
                row_number() OVER (PARTITION BY {name} ORDER BY allocated_uj) AS rank
            FROM requests WHERE {_BETWEEN} AND {_ANSWERED}
        )
        SELECT name, min(allocated_uj) FILTER (WHERE 2 * rank >= n),
            min(allocated_uj) FILTER (WHERE 100 * rank >= 95 * n)
        FROM ranked GROUP BY 1
    """
    return {group: (p50, p95) for group, p50, p95 in database.execute(query, span)}


def _parts(database: sqlite3.Connection, name: str, span: Span) -> dict[str | None, Parts]:
    """Allocated energy by group, device and phase."""
    query = f"""
        SELECT {name}, places, part.key, sum(part.value)
        FROM requests, json_each(parts_uj) AS part WHERE {_BETWEEN} GROUP BY 1, kind_id, 3
    """
    parts: defaultdict[str | None, Parts] = defaultdict(Counter)
    for group, places, number, energy_uj in database.execute(query, span):
        device, phase = json.loads(places)[number]
        parts[group][device, phase] += energy_uj
    return parts
