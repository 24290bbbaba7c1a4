"""llama.cpp through its C interface: one batch of sequences, each with a cache of its own."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from loadtests.peers.worker import Ids, Load, Run, Runner, serve

_MOST_ROWS = 8
_CONTEXT = 128
"""Tokens of each sequence: 64 read and 64 written."""


def load(order: Load) -> Runner:
    """A runner of ``<variant>.gguf`` in ``order.folder``."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(Path(order.folder) / f"{order.variant}.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError(f"llama.cpp could not load {order.variant}.gguf")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = _MOST_ROWS * _CONTEXT
    parameters.n_batch = parameters.n_ubatch = _MOST_ROWS * _CONTEXT // 2
    parameters.n_seq_max = _MOST_ROWS
    parameters.n_threads = parameters.n_threads_batch = order.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError("llama.cpp could not make a context")
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    return lambda run: generate(context, words, run)


def generate(context: Any, words: int, run: Run) -> Ids:
    """Greedy: the prompts in one batch, then one token of every sequence a step."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(_MOST_ROWS * _CONTEXT, 0, 1)
    try:
        rows = len(run.rows)
        # Sorted by row, so that the i-th logits are those of row i.
        read = [(row, place, token) for row in range(rows) for place, token in enumerate(run.rows[row])]
        last = len(run.rows[0]) - 1
        texts: Ids = [[] for _ in range(rows)]
        for step in range(run.new_tokens):
            batch.n_tokens = len(read)
            where = []
            for number, (row, place, token) in enumerate(read):
                batch.token[number], batch.pos[number] = token, place
                batch.n_seq_id[number], batch.seq_id[number][0] = 1, row
                batch.logits[number] = place == last + step
                if place == last + step:
                    where.append(number)
            if code := llama_cpp.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            for row, number in enumerate(where):
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, number), shape=(words,))
                texts[row].append(int(logits.argmax()))
            read = [(row, last + step + 1, text[-1]) for row, text in enumerate(texts)]
    finally:
        llama_cpp.llama_batch_free(batch)
    return texts


if __name__ == "__main__":
    serve(("llama-cpp-python",), load)
