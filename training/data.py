"""Rows from files, cleaned, and batches by tokens. Knows nothing of tasks or models."""

import gzip
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import TrainingError

Row = dict[str, Any]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BREAK = re.compile(r"<br\s*/?>")
_SPACES = re.compile(r"[^\S\n]+")


def clean(text: str) -> str:
    """NFC, without control characters, runs of spaces folded; line breaks stay, HTML ones become plain."""
    text = _BREAK.sub("\n", unicodedata.normalize("NFC", text.replace("\r\n", "\n")))
    return _SPACES.sub(" ", _CONTROL.sub("", text)).strip()


def read_rows(path: Path, required: Sequence[str]) -> Iterator[Row]:
    """Rows of a JSON Lines file, gzip'd or not, each an object that has the ``required`` fields.

    Raises ``TrainingError`` naming file and line.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; the recipe says where its data comes from (`where`)")
    opener = gzip.open if path.suffix == ".gz" else open
    seen = False
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise TrainingError(f"{path}, line {number}: not JSON: {error}") from error
                missing = [name for name in required if not isinstance(row, dict) or name not in row]
                if missing:
                    raise TrainingError(f"{path}, line {number}: no field {missing[0]!r}")
                seen = True
                yield row
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error
    if not seen:
        raise TrainingError(f"{path}: holds no rows")


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of sample indices whose padded size (rows x longest) stays within ``batch_tokens``.

    The order is drawn from ``(seed, epoch)`` alone, so that a resumed run sees what an unbroken one sees.
    Samples are sorted by length within pools of about 64 batches: little padding, still random company.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    mean = max(1.0, float(np.mean(lengths)))
    pool = max(1, int(64 * batch_tokens / mean))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool):
        batch: list[int] = []
        # Ascending, so that the newest member of a batch is its longest.
        for index in sorted(order[start : start + pool].tolist(), key=lambda index: lengths[index]):
            if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def take_share(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """``share`` of the rows: 2.5 is every row twice and a random half of them once more."""
    whole, part = divmod(share, 1.0)
    rng = np.random.default_rng(seed)
    extra = rng.permutation(len(rows))[: round(part * len(rows))]
    return list(rows) * int(whole) + [rows[index] for index in sorted(extra.tolist())]
