"""How long a search takes in a large knowledge base made of real sentences. Knows nothing of how it is searched."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from models.sentences import split_sentences
from training.formats import Row
from training.knowledge import Ask

BASE = "search-speed"
SENTENCES = 6
"""Of one passage: about as long as SQuAD's."""
DOCUMENTS = 1000
"""Of one request."""
WARM_UP = 20
QUERIES = 500


@dataclass(frozen=True)
class SearchSpeed:
    """What was measured."""

    passages: int
    put_s: float
    median_ms: float
    p95_ms: float


def search_speed(ask: Ask, rows: Sequence[Row], passages: int) -> SearchSpeed:
    """Time searches, one after the other, for the questions of ``rows`` among passages recombined of their sentences.

    The first ``WARM_UP`` are not counted.
    """
    rng = random.Random(0)
    sentences = [
        context[start:end]
        for context in dict.fromkeys(row["context"] for row in rows)
        for start, end in split_sentences(context)
    ]
    questions = list(dict.fromkeys(row["question"] for row in rows))
    rng.shuffle(questions)
    started_s = time.monotonic()
    with tqdm(total=passages, desc="putting", unit="passage", mininterval=1.0) as bar:
        for batch in _batches(rng, sentences, passages):
            ask(f"knowledge/{BASE}/documents", batch)
            bar.update(len(batch))
    put_s = time.monotonic() - started_s
    times_ms = []
    for question in tqdm(questions[: WARM_UP + QUERIES], desc="searching", unit="query", mininterval=1.0):
        asked_s = time.perf_counter()
        ask(f"knowledge/{BASE}/search", {"query": question})
        times_ms.append((time.perf_counter() - asked_s) * 1000)
    counted = times_ms[WARM_UP:] or times_ms
    return SearchSpeed(passages, put_s, float(np.median(counted)), float(np.quantile(counted, 0.95)))


def _batches(rng: random.Random, sentences: Sequence[str], passages: int) -> Iterator[list[dict[str, str]]]:
    for start in range(0, passages, DOCUMENTS):
        numbers = range(start, min(start + DOCUMENTS, passages))
        # Short enough to stay one passage.
        yield [{"id": str(number), "text": " ".join(rng.choices(sentences, k=SENTENCES))[:1200]} for number in numbers]
