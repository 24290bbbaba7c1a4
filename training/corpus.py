"""A corpus of any size as token ids on disk: duplicates dropped, tokenised once, read as blocks of equal length.

Only some rows are in memory at a time; 120 bytes a row stand on disk while duplicates are looked for. Knows nothing
of objectives or models.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import islice, pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from training.errors import TrainingError, writing
from training.records import write_whole

IDS, CORPUS = "ids.bin", "corpus.json"
SHINGLE = 5
"""Words of one shingle; two texts are as near as the share of shingles that they have in common."""
BANDS, HASHES_PER_BAND = 14, 8
"""Texts that share 0.75 of their shingles are found with a probability of 0.77, 0.85 with 0.99, 0.5 with 0.05; the
values of FineWeb (Penedo et al. 2024)."""
_MIX = np.uint64(0x9E3779B97F4A7C15)
_RNG = np.random.default_rng(0)
_FACTORS = _RNG.integers(0, 2**63, BANDS * HASHES_PER_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RNG.integers(0, 2**64, BANDS * HASHES_PER_BAND, dtype=np.uint64)

Texts = Callable[[], Iterable[str]]
"""Reads the texts of a set once more."""


@dataclass(frozen=True)
class Dropped:
    """Rows of a corpus that no model sees, by reason."""

    empty: int
    evaluated: int
    """The same as, or nearly, a text of a set to evaluate on."""
    exact: int
    """The same as an earlier text, case and spacing aside."""
    near: int
    """Nearly the same as an earlier text."""


@dataclass(frozen=True)
class Corpus:
    """All texts of some sets end to end, each closed by an end mark."""

    ids: NDArray[np.uint32]
    """On disk; (tokens,)."""
    tokens: dict[str, int]
    """Of each set, in the order in which they stand."""
    rows: dict[str, int]
    """Rows kept of each set."""

    def starts(self, size: int) -> list[NDArray[np.int64]]:
        """Where the blocks of ``size`` tokens of each set begin; one more token stands behind each."""
        ends = np.cumsum([0, *self.tokens.values()])
        return [begin + size * np.arange(max(0, (end - begin - 1) // size)) for begin, end in pairwise(ends)]


def keys_of(text: str) -> NDArray[np.uint64]:
    """``(1 + BANDS,)``: a hash of the text, case and spacing aside, then one for each band of its MinHash signature.

    Broder 1997; two texts whose band is the same share most of their shingles. A text without words is all zeros.
    """
    words = text.casefold().split()
    if not words:
        return np.zeros(1 + BANDS, dtype=np.uint64)
    exact = np.frombuffer(blake2b(" ".join(words).encode(), digest_size=8).digest(), dtype=np.uint64)
    words = re.findall(r"\w+", " ".join(words)) or words
    hashes = np.array([crc32(word.encode()) for word in words] + [0] * (SHINGLE - len(words)), dtype=np.uint64)
    shingles = _folded(np.lib.stride_tricks.sliding_window_view(hashes, SHINGLE))
    signature = np.full(BANDS * HASHES_PER_BAND, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 1024):
        part = shingles[start : start + 1024, None] * _FACTORS + _OFFSETS
        signature = np.minimum(signature, part.min(axis=0))
    return np.concatenate([exact, _folded(signature.reshape(BANDS, HASHES_PER_BAND))])


def _folded(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One well mixed number for each row."""
    folded = np.zeros(len(numbers), dtype=np.uint64)
    for column in numbers.T:
        folded = (folded ^ column) * _MIX
        folded ^= folded >> np.uint64(29)
    return folded


def find_unique(keys: NDArray[np.uint64], n_evaluated: int) -> tuple[NDArray[np.bool_], Dropped]:
    """Which rows of ``keys`` (rows, 1 + BANDS) to keep: of rows that share a key, the first.

    The first ``n_evaluated`` are texts to evaluate on; the mask leaves them out.
    """
    index = np.arange(len(keys))
    earliest, exact = index.copy(), np.zeros(len(keys), dtype=np.bool_)
    for column in range(keys.shape[1]):
        _, first, inverse = np.unique(keys[:, column], return_index=True, return_inverse=True)
        earliest = np.minimum(earliest, first[inverse])
        if column == 0:
            exact = first[inverse] < index
    empty = keys[:, 0] == 0
    evaluated = (earliest < n_evaluated) & ~empty
    keep = (earliest == index) & ~empty
    repeated = ~keep & ~empty & ~evaluated
    dropped = Dropped(
        *(int(mask[n_evaluated:].sum()) for mask in (empty, evaluated, repeated & exact, repeated & ~exact))
    )
    return keep[n_evaluated:], dropped


def unique_texts(sets: dict[str, Texts], evaluated: Iterable[str], run: Path) -> tuple[dict[str, Texts], Dropped]:
    """The sets without duplicates, of which the first is kept, and without texts like those to evaluate on."""
    path = run / "keys.bin.partial"
    with writing(path), path.open("wb") as file:
        n_evaluated = _write_keys(evaluated, file.write)
        lengths = [
            _write_keys(tqdm(texts(), desc=f"comparing {title}", unit="row", mininterval=1.0), file.write)
            for title, texts in sets.items()
        ]
    try:
        keys = np.fromfile(path, dtype=np.uint64).reshape(-1, 1 + BANDS)
    finally:
        path.unlink()
    keep, dropped = find_unique(keys, n_evaluated)
    ends = np.cumsum([0, *lengths])
    kept = {
        title: _Kept(texts, keep[begin:end])
        for (title, texts), (begin, end) in zip(sets.items(), pairwise(ends), strict=True)
    }
    return dict(kept), dropped


def _write_keys(texts: Iterable[str], write: Callable[[bytes], int]) -> int:
    count = 0
    for text in texts:
        write(keys_of(text).tobytes())
        count += 1
    return count


@dataclass(frozen=True)
class _Kept:
    """The texts of a set that a mask keeps."""

    texts: Texts
    mask: NDArray[np.bool_]

    def __call__(self) -> Iterator[str]:
        return (text for text, keep in zip(self.texts(), self.mask, strict=True) if keep)


def write_corpus(sets: dict[str, Texts], tokenizer: Tokenizer, end: int, run: Path, made_from: str) -> Corpus:
    """Tokenise every set into ``run``, each text followed by the id ``end``; ``made_from`` tells this corpus apart."""
    partial = run / f"{IDS}.partial"
    tokens: dict[str, int] = {}
    rows: dict[str, int] = {}
    with writing(partial), partial.open("wb") as file:
        for title, texts in sets.items():
            tokens[title] = rows[title] = 0
            bar = iter(tqdm(texts(), desc=f"tokenising {title}", unit="row", mininterval=1.0))
            while block := list(islice(bar, 1024)):
                for encoding in tokenizer.encode_batch(block, add_special_tokens=False):
                    file.write(np.array([*encoding.ids, end], dtype=np.uint32).tobytes())
                    tokens[title] += len(encoding.ids) + 1
                rows[title] += len(block)
    partial.replace(run / IDS)
    write_whole(run / CORPUS, json.dumps({"made_from": made_from, "tokens": tokens, "rows": rows}))
    return open_corpus(run, made_from)


def open_corpus(run: Path, made_from: str) -> Corpus:
    """The corpus of a run, as ``write_corpus`` left it. Raises ``TrainingError`` where it was made from other data."""
    about = json.loads((run / CORPUS).read_text(encoding="utf-8"))
    if about["made_from"] != made_from:
        raise TrainingError(
            f"{run}: its ids were made from other data or with another tokenizer; delete the folder to begin anew"
        )
    if not sum(about["tokens"].values()):
        raise TrainingError(f"{run}: no text is left to train on")
    return Corpus(np.memmap(run / IDS, dtype=np.uint32, mode="r"), about["tokens"], about["rows"])


def fingerprint(files: Sequence[Path], tokenizer: Tokenizer, *settings: str) -> str:
    """What a corpus is made from: the names and sizes of its files, its tokenizer, and how they are read."""
    said = [*(f"{path.name} {path.stat().st_size}" for path in files), tokenizer.to_str(), *settings]
    return sha256("\n".join(said).encode()).hexdigest()
