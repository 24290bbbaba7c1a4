"""Optimum's ORTModel: Hugging Face's interface over ONNX Runtime."""

from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForFeatureExtraction, ORTModelForSeq2SeqLM

from loadtests.peers.worker import Ids, Load, Run, Runner, batches, padded, serve

CLASSES: dict[str, Any] = {
    "encode": ORTModelForFeatureExtraction,
    "translate": ORTModelForSeq2SeqLM,
    "generate": ORTModelForCausalLM,
}


def load(order: Load) -> Runner:
    """A runner of the model that `optimum-cli` exported into ``order.folder``."""
    torch.set_num_threads(order.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = order.threads, 1
    model = CLASSES[order.kind].from_pretrained(
        order.folder, session_options=options, provider="CPUExecutionProvider", local_files_only=True
    )
    if order.kind == "encode":
        return lambda run: encode(model, run.rows, order.batch_tokens)
    return lambda run: write(model, run)


def encode(model: Any, rows: Ids, batch_tokens: int) -> list[list[float]]:
    """Mean of the last layer over the tokens, in batches of similar lengths."""
    vectors: list[list[float]] = [[]] * len(rows)
    for places in batches(rows, batch_tokens):
        ids, mask = map(np.array, padded([rows[place] for place in places], 0))
        states = model(input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids)).last_hidden_state
        weights = mask[..., None].astype(np.float32)
        for place, vector in zip(places, (states * weights).sum(1) / weights.sum(1), strict=True):
            vectors[place] = vector.tolist()
    return vectors


def write(model: Any, run: Run) -> Ids:
    """Greedy or beam search; all rows have one length."""
    ids = torch.tensor(run.rows)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=run.beams,
        min_new_tokens=run.new_tokens,
        max_new_tokens=run.new_tokens,
    )
    return [row[-run.new_tokens :] for row in written.tolist()]


if __name__ == "__main__":
    serve(("optimum-onnx", "onnxruntime", "transformers", "torch"), load)
