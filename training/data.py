"""Rows of data sets as tasks read them, cleaned, and batches by tokens. Knows nothing of tasks or models."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError
from training.formats import SUFFIXES, Row, format_of, read_file
from training.hub import hub_files
from training.recipe import HUB, SetRecipe

Fields = Sequence[Sequence[str]]
"""Sets of fields, any of which a row may have."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_BREAK = re.compile(r"<br\s*/?>")
_SPACES = re.compile(r"[^\S\n]+")


def clean(text: str) -> str:
    """NFC, without control characters, runs of spaces folded; line breaks stay, HTML ones become plain."""
    text = _BREAK.sub("\n", unicodedata.normalize("NFC", text.replace("\r\n", "\n")))
    return _SPACES.sub(" ", _CONTROL.sub("", text)).strip()


def read_set(data: Path, part: SetRecipe, required: Fields, known_labels: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of the split of a set, its columns and labels renamed to ours; see ``set_files`` and ``read_rows``."""
    for path in set_files(data, part):
        yield from read_rows(path, required, part.columns, part.labels, known_labels)


def set_files(data: Path, part: SetRecipe) -> list[Path]:
    """The files that hold a split: a file, the ``<split>`` files of a folder, or those of a set of the Hub.

    Raises ``TrainingError`` where there are none, or the split is there in two formats.
    """
    if part.path.startswith(HUB):
        return hub_files(part.path.removeprefix(HUB), part.split)
    path = data / part.path
    if path.is_file():
        return [path]
    # A split may be cut into parts: train-00000-of-00002.parquet.
    name = re.compile(rf"{re.escape(part.split)}(-[\w-]+)?(\.jsonl|\.csv|\.tsv|\.parquet)(\.gz)?")
    found = sorted(each for each in path.glob(f"{part.split}*") if name.fullmatch(each.name))
    if not found:
        raise TrainingError(
            f"{path}: no such file, nor a folder with a {part.split}{', '.join(SUFFIXES)} (or .gz); "
            "the recipe says where its data comes from (`where`)"
        )
    if len({(format_of(each), each.suffix) for each in found}) > 1:
        raise TrainingError(f"{path}: holds {' and '.join(each.name for each in found)}; keep one of them")
    return found


def read_rows(
    path: Path,
    required: Fields,
    columns: Mapping[str, str] = MappingProxyType({}),
    labels: Mapping[str, str] = MappingProxyType({}),
    known_labels: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of a file of any format (``training.formats``) that have one of the ``required`` sets of fields.

    ``columns`` says what the file calls our fields and ``labels`` what we call its labels; where there are
    ``known_labels``, every label must be one. Raises ``TrainingError`` naming file and line.
    """
    if not path.is_file():
        raise TrainingError(f"{path}: no such file; the recipe says where its data comes from (`where`)")
    seen = False
    for place, row in read_file(path):
        try:
            row |= {ours: _field(row, theirs) for ours, theirs in columns.items()}
            chosen = next((fields for fields in required if all(field in row for field in fields)), required[0])
            for field in chosen:
                row[field] = _checked(field, _field(row, field))
            if "label" in chosen:
                row["label"] = labels.get(row["label"], row["label"])
                if known_labels and row["label"] not in known_labels:
                    raise ValueError(
                        f"label {row['label']!r} is none of {', '.join(known_labels)}; map it in `labels`"
                    )
            if "answers" in chosen and "context" in chosen:
                _check_places(row["answers"], row["context"])
        except ValueError as error:
            raise TrainingError(f"{path}, {place}: {error}") from error
        seen = True
        yield row
    if not seen:
        raise TrainingError(f"{path}: holds no rows")


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"no field {name!r}; it has {', '.join(map(str, row))}: name the right one in `columns`")
    return row[name]


def _checked(field: str, value: Any) -> Any:
    """The value of a field as tasks read it. Raises ``ValueError``."""
    if field == "answers":
        return _answers(value)
    if field == "label" and isinstance(value, int | float):
        # Tables with gaps make floats of whole numbers.
        return str(value).removesuffix(".0")
    if not isinstance(value, str):
        raise ValueError(f"{field!r} is {json.dumps(value, default=str)[:40]}, not a text")
    return value


def _answers(value: Any) -> list[Row]:
    """Answers as ``[{"text", "start"}]``, from that, from either form of SQuAD, or from JSON in a cell of text."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        if isinstance(value, dict):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(each["text"], each["start" if "start" in each else "answer_start"]) for each in value]
        if not all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
            raise TypeError
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError('\'answers\' is no list of {"text": ..., "start": ...}') from error
    return [{"text": text, "start": start} for text, start in pairs]


def _check_places(answers: list[Row], context: str) -> None:
    for each in answers:
        found = context[each["start"] : each["start"] + len(each["text"])]
        if not found or found != each["text"]:
            raise ValueError(f"the answer {each['text']!r} does not stand at character {each['start']} of its context")


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


class Sized(Protocol):
    """What has a length in tokens."""

    @property
    def length(self) -> int:
        """How many."""


SizedSample = TypeVar("SizedSample", bound=Sized)


def deal(batch: Sequence[SizedSample], processes: int, most_tokens: int | None) -> list[list[Sequence[SizedSample]]]:
    """Divide a batch into rounds, and each round among ``processes``: ``dealt[round][process]``.

    A part's padded size stays within ``most_tokens`` where one sample does; no sample is in two parts; where there are
    fewer samples than parts, some are empty.
    """
    rows = len(batch)
    if most_tokens is not None:
        rows = max(1, most_tokens // max(sample.length for sample in batch))
    parts = processes * -(-len(batch) // (processes * rows))
    # Neighbours are of like length, so every part gets its share of the long ones.
    dealt = [batch[start::parts] for start in range(parts)]
    return [dealt[start : start + processes] for start in range(0, parts, processes)]


def take_share(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """``share`` of the rows: 2.5 is every row twice and a random half of them once more."""
    whole, part = divmod(share, 1.0)
    rng = np.random.default_rng(seed)
    extra = rng.permutation(len(rows))[: round(part * len(rows))]
    return list(rows) * int(whole) + [rows[index] for index in sorted(extra.tolist())]


def mixed(counts: Sequence[float], temperature: float) -> list[int]:
    """Parts of a whole of ``sum(counts)`` in proportion to ``counts ** (1 / temperature)`` (Raffel et al. 2020)."""
    weights = np.array(counts) ** (1 / temperature)
    return [round(part) for part in (weights / max(weights.sum(), 1e-300) * sum(counts)).tolist()]


def draw(size: int, count: int, seed: Sequence[int], epoch: int) -> NDArray[np.int64]:
    """``count`` of ``size`` indices for an epoch: over the epochs every one comes once before any comes twice."""
    begin = epoch * count
    first, last = begin // size, (begin + count - 1) // size
    orders = [np.random.default_rng((*seed, number)).permutation(size) for number in range(first, last + 1)]
    return np.concatenate(orders)[begin - first * size :][:count]
