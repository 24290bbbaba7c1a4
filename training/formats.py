"""Rows of files, one at a time: JSON Lines, CSV, TSV, Parquet. Knows nothing of what the rows mean."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.errors import TrainingError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
"""Of the formats; all but Parquet, which is compressed already, may have ``.gz`` behind."""


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of ``path`` and where each stands (``line 3``, ``row 3``); no more than a few are in memory at a time.

    Raises ``TrainingError`` naming file and line.
    """
    suffix = format_of(path)
    try:
        if suffix == ".jsonl":
            yield from _json_lines(path)
        elif suffix == ".csv":
            yield from _table(path, ",", csv.QUOTE_MINIMAL)
        elif suffix == ".tsv":
            # As IANA registers it: no cell holds a tab or a line break, so quotes are text.
            yield from _table(path, "\t", csv.QUOTE_NONE)
        elif suffix == ".parquet":
            yield from _parquet(path)
        else:
            raise TrainingError(f"{path}: unknown format; known are {', '.join(SUFFIXES)}, each but the last also .gz")
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error


def format_of(path: Path) -> str:
    """The suffix that says the format, without ``.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                # Spreadsheets begin UTF-8 with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{path}, line {number}: byte 0x{error.object[error.start]:02x} is not UTF-8; "
            "convert the file: iconv -f ENCODING -t UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TrainingError(f"{path}, after line {number}: cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TrainingError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TrainingError(f"{path}, line {number}: not a JSON object")
        yield f"line {number}", row


def _table(path: Path, delimiter: str, quoting: int) -> Iterator[tuple[str, Row]]:
    """Rows of a table whose first line names the columns; every cell is text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 KiB, which a document may have
    reader = csv.reader(
        (text for _, text in _lines(path)),
        delimiter=delimiter,
        quoting=quoting,  # type: ignore[arg-type]  # typeshed names the constants' values
        strict=True,
    )
    begin = 1
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise TrainingError(f"{path}, line 1: two columns have the same name; every column needs its own")
        begin = reader.line_num + 1
        for cells in reader:
            # A quoted cell may hold line breaks: a row is found where it begins.
            place, begin = f"line {begin}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(names):
                raise TrainingError(f"{path}, {place}: {len(cells)} cells, but {len(names)} columns")
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise TrainingError(
            f"{path}, in the row that begins at line {begin}: {error}; is a quote not closed?"
        ) from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise TrainingError(f"{path}: Parquet needs pyarrow: pip install -e '.[train]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise TrainingError(f"{path}, after row {number}: cannot be read as Parquet: {error}") from error
