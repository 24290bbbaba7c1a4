"""Hugging Face Transformers on PyTorch: what a pipeline calls, from token ids to token ids."""

from typing import Any

import torch
import transformers

from loadtests.peers.worker import Ids, Load, Run, Runner, batches, padded, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSES: dict[str, Any] = {
    "encode": transformers.AutoModel,
    "translate": transformers.AutoModelForSeq2SeqLM,
    "generate": transformers.AutoModelForCausalLM,
}


def load(order: Load) -> Runner:
    """A runner of the model in ``order.folder``."""
    torch.set_num_threads(order.threads)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = CLASSES[order.kind].from_pretrained(order.folder, dtype=DTYPES[order.variant]).eval()
    if order.kind == "encode":
        return lambda run: encode(model, run.rows, order.batch_tokens)
    return lambda run: write(model, run)


def encode(model: Any, rows: Ids, batch_tokens: int) -> list[list[float]]:
    """Mean of the last layer over the tokens, in batches of similar lengths."""
    vectors: list[list[float]] = [[]] * len(rows)
    with torch.inference_mode():
        for places in batches(rows, batch_tokens):
            ids, mask = map(torch.tensor, padded([rows[place] for place in places], 0))
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(states.dtype)
            for place, vector in zip(places, (states * weights).sum(1) / weights.sum(1), strict=True):
                vectors[place] = vector.float().tolist()
    return vectors


def write(model: Any, run: Run) -> Ids:
    """Greedy or beam search; all rows have one length."""
    ids = torch.tensor(run.rows)
    with torch.inference_mode():
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
    serve(("torch", "transformers"), load)
