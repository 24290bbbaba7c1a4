"""The ledger's table: its versions, and records as rows. Knows nothing of when they are written."""

import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from energy.types import Bill, CarbonAssumptions, Part, Parts, Phase, Quality, RequestRecord, SettledRecord

SCHEMA_VERSION = 2
_log = logging.getLogger(__name__)

# The rows lie in the order of their writing, so that forgetting the oldest frees whole pages. What they all assume
# about carbon is longer than the rest of a row, and kept once.
_TABLES = """
CREATE TABLE carbon (
    carbon_id INTEGER PRIMARY KEY,
    assumptions TEXT NOT NULL UNIQUE
);
CREATE TABLE requests (
    request_id TEXT NOT NULL UNIQUE,
    time_s REAL NOT NULL,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    "key" TEXT,
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
    parts TEXT NOT NULL DEFAULT '[]',
    carbon_id INTEGER NOT NULL REFERENCES carbon
);
CREATE INDEX requests_by_time ON requests (time_s);
"""
_FIRST_COLUMNS = (
    "request_id, time_s, task, model, status, input_tokens, output_tokens, queue_ms, compute_ms, "
    "active_uj, allocated_uj, gco2e, quality, settled"
)
_REQUEST = ", ".join(f'"{name}"' for name in RequestRecord._fields)
_COLUMNS = f"{_REQUEST}, time_s, active_uj, allocated_uj, gco2e, quality, settled, parts"
SELECT = f"SELECT {_COLUMNS}, assumptions FROM requests NATURAL JOIN carbon"
"""The rows that ``from_row`` reads; ``parts`` is ``[[device, phase, microjoules], ...]``."""
_ID = "(SELECT carbon_id FROM carbon WHERE assumptions = {})"
_INSERT_CARBON = "INSERT OR IGNORE INTO carbon (assumptions) VALUES (?)"
_INSERT = f"INSERT OR REPLACE INTO requests ({_COLUMNS}, carbon_id) VALUES "
_ROW = f"({', '.join('?' * 17)})"
_ROWS_AT_ONCE = 32
"""Of one statement: each lets go of the interpreter and waits to have it again, and is prepared once for each number
of rows, which takes longer the more there are."""

_UPGRADES = {
    0: _TABLES,
    1: f"""
ALTER TABLE requests RENAME TO requests_1;
DROP INDEX requests_by_time;
{_TABLES}
INSERT INTO carbon (assumptions) SELECT DISTINCT carbon FROM requests_1;
INSERT INTO requests ({_FIRST_COLUMNS}, carbon_id)
    SELECT {_FIRST_COLUMNS}, {_ID.format("requests_1.carbon")} FROM requests_1 ORDER BY time_s;
DROP TABLE requests_1;
""",
}
"""From each earlier version to the present one; 0 is an empty file."""


class UnknownSchema(Exception):
    """The file was written by a later version of this program."""


def upgrade(database: sqlite3.Connection) -> None:
    """Bring the file to ``SCHEMA_VERSION``, in one transaction. Raises ``UnknownSchema`` and ``sqlite3.Error``."""
    version = schema_version(database)
    if version == SCHEMA_VERSION:
        return
    if version:
        _log.info("the ledger's schema goes from version %d to %d", version, SCHEMA_VERSION)
    database.executescript(f"BEGIN IMMEDIATE; {_UPGRADES[version]} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    # Lets the file shrink when records go; takes effect with a VACUUM.
    database.executescript("PRAGMA auto_vacuum = INCREMENTAL; VACUUM;")


def schema_version(database: sqlite3.Connection) -> int:
    """The version of the file; 0 where it is empty. Raises ``UnknownSchema``."""
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version not in (*_UPGRADES, SCHEMA_VERSION):
        raise UnknownSchema(f"its schema has version {version}; this program knows up to {SCHEMA_VERSION}")
    return version


def insert(database: sqlite3.Connection, records: Sequence[SettledRecord]) -> None:
    """Write records; one of a request that is there already replaces it."""
    carbon_ids = {}
    # Those of one process are one object: comparing what they say would take as long as the rest of a row.
    for name, carbon in {id(record.carbon): record.carbon for record in records}.items():
        assumptions = json.dumps(asdict(carbon))
        database.execute(_INSERT_CARBON, (assumptions,))
        (carbon_ids[name],) = database.execute(f"SELECT {_ID.format('?')}", (assumptions,)).fetchone()
    for first in range(0, len(records), _ROWS_AT_ONCE):
        some = records[first : first + _ROWS_AT_ONCE]
        values = [value for record in some for value in _to_row(record, carbon_ids[id(record.carbon)])]
        database.execute(_INSERT + ", ".join([_ROW] * len(some)), values)


def from_row(row: tuple[Any, ...]) -> SettledRecord:
    """A record that ``SELECT`` has found."""
    count = len(RequestRecord._fields)
    time_s, active_uj, allocated_uj, gco2e, quality, settled, parts, carbon = row[count:]
    request = RequestRecord(*row[:count])
    return SettledRecord(
        request,
        Bill(
            request.request_id,
            active_uj,
            allocated_uj,
            gco2e,
            Quality(quality),
            bool(settled),
            tuple(Part(device, Phase(phase), energy_uj) for device, phase, energy_uj in json.loads(parts)),
        ),
        time_s,
        CarbonAssumptions(**json.loads(carbon)),
    )


def _to_row(record: SettledRecord, carbon_id: int) -> tuple[object, ...]:
    request, bill, time_s, _ = record
    _, active_uj, allocated_uj, gco2e, quality, settled, parts = bill
    json_parts = Parts.of(parts).as_lists()
    return (*request, time_s, active_uj, allocated_uj, gco2e, str(quality), settled, json_parts, carbon_id)
