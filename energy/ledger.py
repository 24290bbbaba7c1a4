"""One record per request in SQLite. Knows nothing of how a bill comes about.

A thread of its own writes, in batches at most a second apart, so that losing the process loses at most that second.
A disk that is full or read-only never stops the service: records wait, the oldest are dropped beyond a bound, and
``healthy`` and the log say so until writing succeeds again.
"""

import json
import logging
import sqlite3
import threading
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from energy.clock import Clock
from energy.types import Bill, CarbonAssumptions, Quality, RequestRecord, SettledRecord

SCHEMA_VERSION = 1
MAX_WAITING = 10_000
_INTERVAL_S = 1.0
_S_PER_DAY = 86_400.0
_log = logging.getLogger(__name__)

_SCHEMA = f"""
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    time_s REAL NOT NULL,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    queue_ms REAL NOT NULL,
    compute_ms REAL NOT NULL,
    active_uj INTEGER,
    allocated_uj INTEGER,
    gco2e REAL,
    quality TEXT NOT NULL,
    settled INTEGER NOT NULL,
    carbon TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX requests_by_time ON requests (time_s);
PRAGMA user_version = {SCHEMA_VERSION};
"""
_COLUMNS = (
    "request_id, time_s, task, model, status, input_tokens, output_tokens, queue_ms, compute_ms, "
    "active_uj, allocated_uj, gco2e, quality, settled, carbon"
)
_INSERT = f"INSERT OR REPLACE INTO requests ({_COLUMNS}) VALUES ({', '.join('?' * 15)})"


class Ledger:
    """The records of ``path``, kept for ``retention_days``."""

    def __init__(self, path: Path, retention_days: float = 90.0, clock: Clock | None = None) -> None:
        self._path = path
        self._retention_s = retention_days * _S_PER_DAY
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._waiting: dict[str, SettledRecord] = {}
        self._failure: str | None = None
        self._dropped = 0
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
        """Why the ledger cannot be written; None where it can."""
        return self._failure

    def put(self, record: SettledRecord) -> None:
        """Write ``record`` within a second; a later record of the same request replaces an earlier one."""
        with self._lock:
            self._waiting[record.request.request_id] = record
            while len(self._waiting) > MAX_WAITING:
                del self._waiting[next(iter(self._waiting))]
                self._dropped += 1
        self._wake.set()

    def find(self, request_id: str) -> SettledRecord | None:
        """The latest record of a request, written or not; None where there is none, or none that can be read."""
        with self._lock:
            waiting = self._waiting.get(request_id)
        if waiting is not None:
            return waiting
        rows = self._read(f"SELECT {_COLUMNS} FROM requests WHERE request_id = ?", request_id)
        return _from_row(rows[0]) if rows else None

    def latest(self, count: int) -> list[SettledRecord]:
        """The last ``count`` requests that are written, newest first; none where they cannot be read."""
        return [
            _from_row(row)
            for row in self._read(f"SELECT {_COLUMNS} FROM requests ORDER BY time_s DESC LIMIT ?", count)
        ]

    def allocated_uj(self, since_s: float) -> int:
        """Energy of all requests that are written and were over at ``since_s`` or later (seconds since 1970)."""
        rows = self._read("SELECT sum(allocated_uj) FROM requests WHERE time_s >= ?", since_s)
        return rows[0][0] or 0 if rows else 0

    def close(self) -> None:
        """Write what waits and end the writer."""
        self._stop.set()
        self._wake.set()
        self._writer.join()

    def _read(self, query: str, value: object) -> list[tuple[Any, ...]]:
        """The rows of a query; none where the file cannot be read."""
        try:
            with closing(sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                return database.execute(query, (value,)).fetchall()
        except sqlite3.Error:
            return []

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._stop.wait(_INTERVAL_S)
            self._wake.clear()
            self._flush()
            if self._failure is not None:
                self._wake.set()
        # What was put while the last batch was being written.
        self._flush()

    def _flush(self) -> None:
        """Write everything that waits in one transaction; on failure it goes on waiting."""
        with self._lock:
            batch = dict(self._waiting)
        try:
            self._write(batch)
        except (sqlite3.Error, OSError, _UnknownSchema) as error:
            if self._failure is None:
                _log.warning("the ledger %s cannot be written, the service goes on without it: %s", self._path, error)
            self._failure = str(error)
            return
        with self._lock:
            for request_id, record in batch.items():
                # Identity, not equality: a newer record of the same request may have come meanwhile.
                if self._waiting.get(request_id) is record:
                    del self._waiting[request_id]
            dropped, self._dropped = self._dropped, 0
        if self._failure is not None:
            _log.warning("the ledger %s is written again; %d records were dropped", self._path, dropped)
            self._failure = None

    def _write(self, batch: dict[str, SettledRecord]) -> None:
        # Opened for every batch: a file that was removed, remounted or repaired is found again by itself.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path)) as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise _UnknownSchema(f"its schema has version {version}; this program writes {SCHEMA_VERSION}")
            database.execute("PRAGMA journal_mode = WAL")
            # Safe against losing the process; losing power may cost the last commits, never the file (SQLite on WAL).
            database.execute("PRAGMA synchronous = NORMAL")
            if version == 0:
                database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            with database:
                database.executemany(_INSERT, [_to_row(record) for record in batch.values()])
                database.execute("DELETE FROM requests WHERE time_s < ?", (self._clock.unix_s() - self._retention_s,))


class _UnknownSchema(Exception):
    pass


def _to_row(record: SettledRecord) -> tuple[object, ...]:
    request, bill = record.request, record.bill
    return (
        request.request_id,
        record.time_s,
        request.task,
        request.model,
        request.status,
        request.input_tokens,
        request.output_tokens,
        request.queue_ms,
        request.compute_ms,
        bill.active_uj,
        bill.allocated_uj,
        bill.gco2e,
        bill.quality.value,
        bill.settled,
        json.dumps(asdict(record.carbon)),
    )


def _from_row(row: tuple[Any, ...]) -> SettledRecord:
    fields = dict(zip(_COLUMNS.split(", "), row, strict=True))
    return SettledRecord(
        request=RequestRecord(**{name: fields[name] for name in RequestRecord.__dataclass_fields__}),
        bill=Bill(
            request_id=fields["request_id"],
            active_uj=fields["active_uj"],
            allocated_uj=fields["allocated_uj"],
            gco2e=fields["gco2e"],
            quality=Quality(fields["quality"]),
            settled=bool(fields["settled"]),
        ),
        time_s=fields["time_s"],
        carbon=CarbonAssumptions(**json.loads(fields["carbon"])),
    )
