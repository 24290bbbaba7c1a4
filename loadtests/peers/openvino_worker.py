"""OpenVINO: its own runtime for encoders, with streams; Optimum Intel, which drives it, for what writes."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino

from loadtests.peers.worker import Ids, Load, Run, Runner, batches, padded, serve


def load(order: Load) -> Runner:
    """A runner of the model in ``order.folder``; ``bf16`` computes the fp32 one in bfloat16."""
    precision = "bf16" if order.variant == "bf16" else "f32"
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": order.threads * order.replicas,
        "NUM_STREAMS": order.replicas,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": True,
    }
    if order.kind == "encode":
        name = "int8.xml" if order.variant == "int8" else "openvino_model.xml"
        queue = openvino.AsyncInferQueue(
            openvino.Core().compile_model(Path(order.folder) / name, "CPU", options), order.replicas
        )
        return lambda run: encode(queue, run.rows, order)

    import torch
    from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM

    torch.set_num_threads(1)
    kinds: dict[str, Any] = {"translate": OVModelForSeq2SeqLM, "generate": OVModelForCausalLM}
    options = {name: str(value) for name, value in options.items()}
    model = kinds[order.kind].from_pretrained(order.folder, ov_config=options, local_files_only=True)
    return lambda run: write(model, run)


def encode(queue: Any, rows: Ids, order: Load) -> list[list[float]]:
    """Mean of the last layer over the tokens, a batch per stream at a time."""
    vectors: list[list[float]] = [[]] * len(rows)

    def keep(request: Any, work: tuple[list[int], Any]) -> None:
        places, mask = work
        states = request.get_output_tensor(0).data
        weights = mask[..., None].astype(np.float32)
        for place, vector in zip(places, (states * weights).sum(1) / weights.sum(1), strict=True):
            vectors[place] = vector.tolist()

    queue.set_callback(keep)
    for places in batches(rows, order.batch_tokens, order.replicas):
        ids, mask = map(np.array, padded([rows[place] for place in places], 0))
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        queue.start_async(feeds, (places, mask))
    queue.wait_all()
    return vectors


def write(model: Any, run: Run) -> Ids:
    """Greedy or beam search; all rows have one length."""
    import torch

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
    serve(("openvino", "optimum-intel", "nncf"), load)
