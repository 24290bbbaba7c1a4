"""onnxruntime-genai: one batch of sequences of one length."""

import json
from typing import Any

import onnxruntime_genai as og

from loadtests.peers.worker import Ids, Load, Run, Runner, serve


def load(order: Load) -> Runner:
    """A runner of the model that its builder wrote into ``order.folder``."""
    config = og.Config(order.folder)
    options = {"intra_op_num_threads": order.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)
    return lambda run: generate(model, run)


def generate(model: Any, run: Run) -> Ids:
    """Greedy."""
    parameters = og.GeneratorParams(model)
    length = len(run.rows[0]) + run.new_tokens
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=len(run.rows))
    generator = og.Generator(model, parameters)
    generator.append_tokens(run.rows)
    while not generator.is_done():
        generator.generate_next_token()
    return [list(map(int, generator.get_sequence(row)[-run.new_tokens :])) for row in range(len(run.rows))]


if __name__ == "__main__":
    serve(("onnxruntime-genai", "onnxruntime"), load)
