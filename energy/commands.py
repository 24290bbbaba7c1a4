"""``wattle energy report``: reads a ledger, prints a table, writes files. Knows nothing of the service."""

import time
from collections.abc import Callable
from pathlib import Path

from energy.ledger import LedgerUnreadable
from energy.page import as_html
from energy.report import Report, read_moment, read_report
from energy.settings import Settings
from energy.tables import MissingPackage, as_text, write_csv, write_parquet

_HOURLY_UP_TO_S = 4 * 86_400
"""A page shows up to so much time by the hour, and more by the day."""


class ReportFailed(Exception):
    """A report that cannot be made or written; the message says why."""


def run_report(settings: Settings, ledger: Path) -> None:
    """Print the report of ``ledger`` that ``settings`` describe, and write the files that they name.

    Raises ``ReportFailed``, and ``ValueError`` for a time that is none.
    """
    now_s = time.time()
    since_s = _moment("since", settings.since, now_s)
    until_s = now_s if settings.until is None else _moment("until", settings.until, now_s)
    if since_s >= until_s:
        raise ValueError("since: must be before until")
    try:
        report = read_report(ledger, since_s, until_s, settings.by)
        timeline = read_report(ledger, since_s, until_s, "hour" if until_s - since_s <= _HOURLY_UP_TO_S else "day")
    except LedgerUnreadable as error:
        raise ReportFailed(f"the ledger {ledger} cannot be read: {error}") from error
    print(as_text(report))
    _write(settings.csv, lambda path: write_csv(report, path))
    _write(settings.parquet, lambda path: write_parquet(report, path))
    _write(settings.html, lambda path: _write_page(report, timeline, path))


def _write(path: Path | None, write: Callable[[Path], object]) -> None:
    if path is None:
        return
    try:
        write(path)
    except (OSError, MissingPackage) as error:
        raise ReportFailed(f"{path} cannot be written: {error}") from error
    print(f"wrote {path}")


def _write_page(report: Report, timeline: Report, path: Path) -> None:
    path.write_text(as_html(report, timeline), encoding="utf-8")


def _moment(setting: str, text: str, now_s: float) -> float:
    try:
        return read_moment(text, now_s)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
