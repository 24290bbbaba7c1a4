"""The ledger's tables: their versions, and records as rows. Knows nothing of when they are written."""

import json
import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from energy.types import Bill, Bills, CarbonAssumptions, Phase, Places, Quality, RequestRecord, SettledRecord

SCHEMA_VERSION = 3
_log = logging.getLogger(__name__)

# The rows lie in the order of their writing, so that forgetting the oldest frees whole pages. What many have in common
# is kept once: it is longer than the rest, and takes as long to write.
_PARTS = """(
    SELECT json_group_array(json_insert(place.value, '$[2]', part.value))
    FROM json_each(places) AS place JOIN json_each(parts_uj) AS part ON part.key = place.key
)"""
_TABLES = f"""
CREATE TABLE kinds (
    kind_id INTEGER PRIMARY KEY,
    task TEXT NOT NULL,
    model TEXT NOT NULL,
    "key" TEXT,
    status TEXT NOT NULL,
    quality TEXT NOT NULL,
    settled INTEGER NOT NULL,
    places TEXT NOT NULL,
    assumptions TEXT NOT NULL
);
CREATE TABLE bills (
    request_id TEXT NOT NULL UNIQUE,
    time_s REAL NOT NULL,
    kind_id INTEGER NOT NULL REFERENCES kinds,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    queue_ms REAL NOT NULL,
    compute_ms REAL NOT NULL,
    active_uj INTEGER,
    allocated_uj INTEGER,
    gco2e REAL,
    parts_uj TEXT NOT NULL
);
CREATE INDEX bills_by_time ON bills (time_s);
CREATE VIEW requests AS
    SELECT request_id, time_s, task, model, "key", status, input_tokens, output_tokens, queue_ms, compute_ms,
        active_uj, allocated_uj, gco2e, quality, settled, {_PARTS} AS parts, assumptions, places, parts_uj, kind_id
    FROM bills CROSS JOIN kinds USING (kind_id);
"""
Row = tuple[str, float, int, int, int, float, float, int | None, int | None, float | None, str]
"""Of ``bills``. ``parts_uj`` is JSON: the energy at each of the places of its kind."""
_ROW = f"({', '.join('?' * 11)})"
_ROWS_AT_ONCE = 32
"""Of one statement: each lets go of the interpreter and waits to have it again."""
_INSERT = f"INSERT OR REPLACE INTO bills VALUES {_ROW}"
_INSERT_MANY = ", ".join([_INSERT, *[_ROW] * (_ROWS_AT_ONCE - 1)])
_INSERT_KIND = f"INSERT OR IGNORE INTO kinds VALUES ({', '.join('?' * 9)})"
SELECT = "SELECT bills.*, kinds.* FROM bills CROSS JOIN kinds USING (kind_id)"
"""The rows that ``from_row`` reads."""


class Kind(NamedTuple):
    """What records have in common; a row of ``kinds`` behind its id."""

    task: str
    model: str
    key: str | None
    status: str
    quality: str
    settled: bool
    places: str
    """JSON: ``[[device, phase], ...]``."""
    assumptions: str
    """JSON: about carbon."""

    @property
    def kind_id(self) -> int:
        """A hash of all of it: whatever process writes a kind to whatever file gives it this id."""
        text = json.dumps(self._replace(settled=bool(self.settled)))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _moving(table: str, key: str, parts: str, assumptions: str) -> str:
    """What brings the ``requests`` of an earlier version here, with expressions for what they lacked or wrote
    otherwise."""
    return f"""
ALTER TABLE requests RENAME TO earlier;
DROP INDEX requests_by_time;
{_TABLES}
INSERT INTO bills
    SELECT request_id, time_s, kind_id(task, model, {key}, status, quality, settled, places({parts}), {assumptions}),
        input_tokens, output_tokens, queue_ms, compute_ms, active_uj, allocated_uj, gco2e, parts_uj({parts})
    FROM {table} ORDER BY time_s;
DROP TABLE earlier;
"""


_UPGRADES = {
    0: _TABLES,
    1: _moving("earlier", "NULL", "'[]'", "carbon"),
    2: _moving("earlier NATURAL JOIN carbon", '"key"', "parts", "assumptions") + "DROP TABLE carbon;",
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
    rows = Rows()
    database.create_function("kind_id", len(Kind._fields), rows.kind_id)
    database.create_function("places", 1, lambda parts: _as_json([part[:2] for part in orjson.loads(parts)]))
    database.create_function("parts_uj", 1, lambda parts: _as_json([part[2] for part in orjson.loads(parts)]))
    database.executescript(f"BEGIN IMMEDIATE; {_UPGRADES[version]} PRAGMA user_version = {SCHEMA_VERSION};")
    rows.insert_kinds(database, rows.kinds)
    database.commit()
    # Lets the file shrink when records go; takes effect with a VACUUM.
    database.executescript("PRAGMA auto_vacuum = INCREMENTAL; VACUUM;")


def schema_version(database: sqlite3.Connection) -> int:
    """The version of the file; 0 where it is empty. Raises ``UnknownSchema``."""
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version not in (*_UPGRADES, SCHEMA_VERSION):
        raise UnknownSchema(f"its schema has version {version}; this program knows up to {SCHEMA_VERSION}")
    return version


class Rows:
    """Records as rows, and what is known of their kinds; its methods may be called from any thread."""

    def __init__(self) -> None:
        self.kinds: dict[int, Kind] = {}
        self._ids: dict[tuple[object, ...], int] = {}

    def of(self, bills: Iterable[Bills]) -> list[Row]:
        """A row for each of ``bills``."""
        rows: list[Row] = []
        carbon, assumptions = None, ""
        for each in bills:
            if each.carbon is not carbon:
                # Those of one process are one object.
                carbon, assumptions = each.carbon, json.dumps(asdict(each.carbon))
            alike = each.task, each.model, each.key, each.status, each.quality, each.settled
            kind_id = self.kind_id(*alike, each.places.names, assumptions)
            ids, times_s, *columns = each.columns()
            rows += zip(ids, times_s, repeat(kind_id), *columns, _each_as_json(each.parts_uj), strict=False)
        return rows

    def kind_id(self, *kind: Any) -> int:
        """The id of the kind with these fields."""
        kind_id = self._ids.get(kind)
        if kind_id is None:
            noted = Kind(*kind)
            kind_id = self._ids[kind] = noted.kind_id
            self.kinds[kind_id] = noted
        return kind_id

    def key_of(self, row: Row) -> str | None:
        """The label of the API key that asked."""
        return self.kinds[row[2]].key

    def record_of(self, row: Row) -> SettledRecord:
        """The record that a row was made of."""
        return from_row((*row, row[2], *self.kinds[row[2]]))

    def insert(self, database: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """Write rows of this object's making; one of a request that is there already replaces it."""
        self.insert_kinds(database, {row[2] for row in rows})
        whole = len(rows) - len(rows) % _ROWS_AT_ONCE
        for first in range(0, whole, _ROWS_AT_ONCE):
            database.execute(_INSERT_MANY, list(chain.from_iterable(rows[first : first + _ROWS_AT_ONCE])))
        database.executemany(_INSERT, rows[whole:])

    def insert_kinds(self, database: sqlite3.Connection, kind_ids: Iterable[int]) -> None:
        """Write kinds that may be there already."""
        database.executemany(_INSERT_KIND, [(kind_id, *self.kinds[kind_id]) for kind_id in kind_ids])


def from_row(row: tuple[Any, ...]) -> SettledRecord:
    """A record that ``SELECT`` has found."""
    request_id, time_s, _, read, written, queue_ms, compute_ms, active_uj, allocated_uj, gco2e, parts_uj = row[:11]
    # Before it stands its id once more.
    kind = Kind(*row[12:])
    places = Places((device, Phase(phase)) for device, phase in json.loads(kind.places))
    parts = places.parts(json.loads(parts_uj))
    return SettledRecord(
        RequestRecord(request_id, kind.task, kind.model, kind.status, read, written, queue_ms, compute_ms, kind.key),
        Bill(request_id, active_uj, allocated_uj, gco2e, Quality(kind.quality), bool(kind.settled), parts),
        time_s,
        CarbonAssumptions(**json.loads(kind.assumptions)),
    )


def _as_json(values: Sequence[object]) -> str:
    return orjson.dumps(values).decode()


def _each_as_json(table: NDArray[np.int64]) -> list[str]:
    """The rows of a table: written in one go and then cut."""
    text = orjson.dumps(np.ascontiguousarray(table), option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return text[1:-1].replace("],[", "]\n[").split("\n")
