"""Results as JSON lines, so that a run that breaks goes on where it was. Knows nothing of who measures what."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """The records of one file; every one is on the disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all: list[Record] = list(_read(path))

    def add(self, kind: str, **fields: Any) -> Record:
        """Append one."""
        record = {"record": kind, **fields}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.all.append(record)
        return record

    def find(self, kind: str, **fields: Any) -> list[Record]:
        """Those of a kind with these values, in the order of their making."""
        wanted = {"record": kind, **fields}
        return [record for record in self.all if all(record.get(name) == value for name, value in wanted.items())]


def _read(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A line without its end was being written when the run broke.
        if line.endswith("\n"):
            yield json.loads(line)
