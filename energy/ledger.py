"""One record per request in SQLite. Knows nothing of how a bill comes about.

A thread of its own writes at once, in one batch whatever came during the last: losing the process loses what was not
settled yet.
A disk that is full or read-only never stops the service: records wait, the oldest are dropped beyond a bound, and
``healthy`` and the log say so until writing succeeds again.
"""

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from energy.clock import Clock
from energy.schema import SCHEMA_VERSION, SELECT, Row, Rows, UnknownSchema, from_row, schema_version, upgrade
from energy.types import Bills, SettledRecord

MAX_WAITING = 10_000
_INTERVAL_S = 0.5
_S_PER_DAY = 86_400.0
_MB = 1_000_000
_PAGES = "SELECT * FROM pragma_page_size, pragma_page_count, pragma_freelist_count"
_SHRUNK = 0.9
"""Of the allowed size, what is kept when it is exceeded, so that forgetting is rare."""
_log = logging.getLogger(__name__)


class LedgerUnreadable(Exception):
    """A ledger's file is absent, damaged or of a version that is not read; the message names no path."""


class Ledger:
    """The records in the file ``path``, none older than ``max_days``, in a file no larger than about ``max_mb``."""

    def __init__(self, path: Path, max_days: float = 90.0, max_mb: float = 1000.0, clock: Clock | None = None) -> None:
        self.path = path
        self._max_age_s = max_days * _S_PER_DAY
        self._max_bytes = max_mb * _MB
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._rows = Rows()
        self._waiting: dict[str, Row] = {}
        """By request. Made where bills are: all that belongs to one is in no cache by the time it is written."""
        self._writing: dict[str, Row] = {}
        """Those that are being written."""
        self._failure: str | None = None
        self._dropped = 0
        self._dropped_before = 0
        self._database: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        """Which file that is open on."""
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._flush()
        self._writer = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._writer.start()

    @property
    def healthy(self) -> bool:
        """Whether the latest attempt to write succeeded."""
        return self._failure is None

    @property
    def failure(self) -> str | None:
        """Why the ledger cannot be written, without a path; None where it can."""
        return self._failure

    @property
    def dropped(self) -> int:
        """Records that were lost because too many waited for a disk that could not be written."""
        return self._dropped

    def put(self, *bills: Bills) -> None:
        """Write ``bills`` soon; a later one of the same request replaces an earlier one."""
        rows = self._rows.of(bills)
        with self._lock:
            self._wait({row[0]: row for row in rows})
        if not self._wake.is_set():
            self._wake.set()

    def find(self, request_id: str) -> SettledRecord | None:
        """The latest record of a request, written or not; None where there is none. Raises ``LedgerUnreadable``."""
        with self._lock:
            row = self._waiting.get(request_id) or self._writing.get(request_id)
        if row is not None:
            return self._rows.record_of(row)
        with open_to_read(self.path) as database:
            found = database.execute(f"{SELECT} WHERE request_id = ?", (request_id,)).fetchone()
        return None if found is None else from_row(found)

    def latest(self, count: int, key: str | None = None) -> list[SettledRecord]:
        """The last ``count`` requests, of ``key`` alone where one is named, newest first, written or not.

        Raises ``LedgerUnreadable``.
        """
        with self._lock:
            unwritten = (self._writing | self._waiting).values()
        recent = [self._rows.record_of(row) for row in unwritten if key in (None, self._rows.key_of(row))]
        query = f'{SELECT} WHERE (:key IS NULL OR "key" = :key) ORDER BY time_s DESC LIMIT :count'
        with open_to_read(self.path) as database:
            written = [from_row(row) for row in database.execute(query, {"key": key, "count": count})]
        records = {record.request.request_id: record for record in (*written, *recent)}
        return sorted(records.values(), key=lambda record: record.time_s, reverse=True)[:count]

    def allocated_uj(self, since_s: float) -> dict[str | None, int]:
        """Energy by key of all requests that are written and were over at ``since_s`` or later (seconds since 1970).

        Raises ``LedgerUnreadable``.
        """
        query = 'SELECT "key", sum(allocated_uj) FROM requests WHERE time_s >= ? GROUP BY 1'
        with open_to_read(self.path) as database:
            return {key: energy_uj or 0 for key, energy_uj in database.execute(query, (since_s,))}

    def close(self) -> None:
        """Write what waits and end the writer."""
        self._stop.set()
        self._wake.set()
        self._writer.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            self._flush()
            if self._failure is not None:
                self._wake.set()
            self._stop.wait(_INTERVAL_S)
        # What was put while the last batch was being written.
        self._flush()
        self._close()

    def _wait(self, rows: dict[str, Row]) -> None:
        """These wait too, the oldest of too many no longer; the lock is held."""
        self._waiting |= rows
        while len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
            self._dropped += 1

    def _flush(self) -> None:
        """Write everything that waits in one transaction; on failure it goes on waiting."""
        with self._lock:
            self._writing, self._waiting = self._waiting, {}
        try:
            self._write(list(self._writing.values()))
        except (sqlite3.Error, OSError, UnknownSchema) as error:
            if self._failure is None:
                _log.warning("the ledger %s cannot be written, the service goes on without it: %s", self.path, error)
            self._failure = _reason(error)
            self._close()
            with self._lock:
                since, self._waiting, self._writing = self._waiting, self._writing, {}
                self._wait(since)
            return
        with self._lock:
            self._writing = {}
            dropped, self._dropped_before = self._dropped - self._dropped_before, self._dropped
        if self._failure is not None:
            _log.warning("the ledger %s is written again; %d records were dropped", self.path, dropped)
            self._failure = None

    def _write(self, rows: Sequence[Row]) -> None:
        database = self._open()
        with database:
            self._rows.insert(database, rows)
            database.execute("DELETE FROM bills WHERE time_s < ?", (self._clock.unix_s() - self._max_age_s,))
        self._shrink(database)

    def _open(self) -> sqlite3.Connection:
        """The connection, or a new one where its file is no longer there: one that was removed, remounted or repaired
        is found again by itself."""
        if self._database is not None and self._opened == self._present():
            return self._database
        self._close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Opened by the thread that makes the ledger, from then on used by the writer alone.
        self._database = database = sqlite3.connect(self.path, check_same_thread=False)
        schema_version(database)
        database.execute("PRAGMA journal_mode = WAL")
        # Safe against losing the process; losing power may cost the last commits, never the file (SQLite on WAL).
        database.execute("PRAGMA synchronous = NORMAL")
        upgrade(database)
        self._opened = self._present()
        return database

    def _present(self) -> tuple[int, int] | None:
        """Which file there is now."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _shrink(self, database: sqlite3.Connection) -> None:
        """Forget the oldest records of a file that has grown too large, and give free pages back to the disk."""
        size, pages, free = database.execute(_PAGES).fetchone()
        if size * pages <= self._max_bytes:
            return
        kept = self._max_bytes * _SHRUNK / (size * (pages - free))
        if kept < 1:
            share = f"SELECT CAST(count(*) * {1 - kept} AS INTEGER) + 1 FROM bills"
            oldest = f"SELECT rowid FROM bills ORDER BY time_s LIMIT ({share})"
            with database:
                database.execute(f"DELETE FROM bills WHERE rowid IN ({oldest})")
        # Not `execute`, which ends after the first page.
        database.executescript("PRAGMA incremental_vacuum")


@contextmanager
def open_to_read(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write; what goes wrong on it raises ``LedgerUnreadable``."""
    # SQLite wants to make files beside a WAL database, which a read-only disk forbids; nobody writes there either.
    still = "" if os.access(path.parent, os.W_OK) or Path(f"{path}-wal").exists() else "&immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{still}", uri=True)) as database:
            version = schema_version(database)
            if version != SCHEMA_VERSION:
                raise UnknownSchema(f"its schema has version {version}: serving brings it to {SCHEMA_VERSION}")
            yield database
    except (sqlite3.Error, UnknownSchema) as error:
        raise LedgerUnreadable(_reason(error)) from error


def _reason(error: Exception) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
