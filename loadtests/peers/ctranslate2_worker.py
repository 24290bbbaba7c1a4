"""CTranslate2, which shares one copy of the weights among its replicas."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np

from loadtests.peers.worker import Ids, Load, Run, Runner, batches, padded, serve


def load(order: Load) -> Runner:
    """A runner of the converted model in ``order.folder``."""
    options: dict[str, Any] = {
        "device": "cpu",
        "compute_type": order.variant,
        "inter_threads": order.replicas,
        "intra_threads": order.threads,
    }
    if order.kind == "encode":
        encoder = ctranslate2.Encoder(order.folder, **options)
        pool = ThreadPoolExecutor(order.replicas)
        return lambda run: encode(encoder, pool, run.rows, order)
    (vocabulary,) = Path(order.folder).glob("*vocabulary.json")
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    numbers = {word: number for number, word in enumerate(words)}
    if order.kind == "translate":
        translator = ctranslate2.Translator(order.folder, **options)
        return lambda run: translate(translator, words, numbers, run, order.replicas)
    generator = ctranslate2.Generator(order.folder, **options)
    return lambda run: generate(generator, words, run, order.replicas)


def encode(encoder: Any, pool: ThreadPoolExecutor, rows: Ids, order: Load) -> list[list[float]]:
    """Mean of the last layer over the tokens."""
    vectors: list[list[float]] = [[]] * len(rows)

    def compute(places: list[int]) -> None:
        found = encoder.forward_batch([rows[place] for place in places])
        states = np.array(found.last_hidden_state)
        _, mask = padded([rows[place] for place in places], 0)
        weights = np.array(mask, np.float32)[..., None]
        for place, vector in zip(places, (states * weights).sum(1) / weights.sum(1), strict=True):
            vectors[place] = vector.tolist()

    for done in [pool.submit(compute, places) for places in batches(rows, order.batch_tokens, order.replicas)]:
        done.result()
    return vectors


def translate(translator: Any, words: list[str], numbers: dict[str, int], run: Run, replicas: int) -> Ids:
    """Greedy or beam search, the rows shared out among the replicas."""
    results = translator.translate_batch(
        [[words[token] for token in row] for row in run.rows],
        max_batch_size=-(-len(run.rows) // replicas),
        beam_size=run.beams,
        length_penalty=1.0,
        min_decoding_length=run.new_tokens,
        max_decoding_length=run.new_tokens,
    )
    return [[numbers[word] for word in result.hypotheses[0]] for result in results]


def generate(generator: Any, words: list[str], run: Run, replicas: int) -> Ids:
    """Greedy, the rows shared out among the replicas."""
    results = generator.generate_batch(
        [[words[token] for token in row] for row in run.rows],
        max_batch_size=-(-len(run.rows) // replicas),
        min_length=run.new_tokens,
        max_length=run.new_tokens,
        include_prompt_in_result=False,
    )
    return [list(result.sequences_ids[0]) for result in results]


if __name__ == "__main__":
    serve(("ctranslate2",), load)
