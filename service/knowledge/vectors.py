"""The vectors of a base in memory, and which lie nearest to another. Knows nothing of models or texts."""

import sqlite3
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All vectors of one moment; never changed, so that searches share it."""

    changes: int
    passages: NDArray[np.int64]
    """``(n,)``, ascending."""
    matrix: NDArray[np.float32]
    """``(n, d)``, rows of unit length: 1.5 KB each at d = 384."""
    complete: bool
    """Whether every passage of the base has a vector."""

    def nearest(self, vector: NDArray[np.float32], limit: int) -> list[int]:
        """The ``limit`` passages nearest to ``vector`` (d,) by cosine, best first; exact."""
        if not len(self.passages):
            return []
        scores = self.matrix @ vector
        best = np.argpartition(-scores, min(limit, len(scores)) - 1)[:limit]
        order = best[np.lexsort((self.passages[best], -scores[best]))]
        return [int(number) for number in self.passages[order]]


class Vectors:
    """Keeps the latest snapshot, and brings it up to date by what has come and gone. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: Snapshot | None = None

    def at(self, database: sqlite3.Connection, model: str, changes: int) -> Snapshot:
        """The vectors of ``model`` that a transaction sees in which the base has had so many ``changes``.

        Passage numbers only grow, and the vector of a number never changes: what is above the last one is new.
        """
        with self._lock:
            latest = self._latest
            if latest is None or latest.changes < changes:
                latest = self._latest = _follow(database, model, changes, latest)
            # A reader that has been overtaken needs what there was before.
            return latest if latest.changes == changes else _follow(database, model, changes, None)


def _follow(database: sqlite3.Connection, model: str, changes: int, before: Snapshot | None) -> Snapshot:
    rows = database.execute("SELECT passage FROM vectors WHERE model = ? ORDER BY passage", (model,))
    present = np.fromiter((number for (number,) in rows), np.int64)
    parts = []
    last = 0
    if before is not None and len(before.passages):
        parts.append(before.matrix[np.isin(before.passages, present, assume_unique=True)])
        last = int(before.passages[-1])
    fresh = database.execute(
        "SELECT vector FROM vectors WHERE model = ? AND passage > ? ORDER BY passage", (model, last)
    ).fetchall()
    if fresh:
        new = np.frombuffer(b"".join(blob for (blob,) in fresh), np.float16)
        parts.append(new.reshape(len(fresh), -1).astype(np.float32))
    (passages,) = database.execute("SELECT count(*) FROM passages").fetchone()
    matrix = np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
    return Snapshot(changes, present, matrix, len(present) == passages)
