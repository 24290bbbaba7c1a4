"""Runs the graphs of a model folder on the batches of training. Knows nothing of how they were made."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.config import TransformerConfig
from models.processor import keep_products_exact
from training.tasks import Batch

Outputs = dict[str, NDArray[np.float32]]


class Graphs:
    """The graphs in a folder, loaded once."""

    def __init__(self, folder: Path, config: TransformerConfig) -> None:
        names = {"encoder": ("model",), "encoder-decoder": ("encoder", "decoder")}
        self._config = config
        self._sessions = {
            name: _session(folder / f"{name}.onnx") for name in names.get(config.architecture, ("decoder",))
        }

    def run(self, batch: Batch) -> Outputs:
        """Everything that they put out for whole texts, by name; what a decoder makes of a text it reads at once."""
        config = self._config
        ids, lengths = batch["ids"].numpy(), batch["lengths"].numpy()
        feeds: dict[str, NDArray[np.generic]] = {"input_ids": ids, "lengths": lengths}
        if config.architecture == "encoder":
            if config.n_token_types:
                feeds["token_types"] = batch["types"].numpy() if "types" in batch else np.zeros_like(ids)
            return self._outputs("model", feeds)
        found: Outputs = {}
        if config.architecture == "encoder-decoder":
            found = self._outputs("encoder", feeds)
            feeds = {
                "input_ids": batch["target"].numpy(),
                "lengths": batch["target_lengths"].numpy(),
                "source_lengths": lengths,
                **{name: array for name, array in found.items() if name.startswith("cross_")},
            }
        elif config.architecture == "prefix-lm":
            feeds["prefix_lengths"] = batch["prefix"].numpy()
        return {**found, **self._outputs("decoder", {**feeds, **self._buffers(*feeds["input_ids"].shape)})}

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Class or span logits, of real tokens alone, or the next word's."""
        logits = self.run(batch)["logits"]
        if self._config.head == "span":
            return logits[np.arange(logits.shape[1]) < batch["lengths"].numpy()[:, None]]
        return logits

    def _buffers(self, rows: int, width: int) -> dict[str, NDArray[np.generic]]:
        """Keys and values of nothing, with room for what is read."""
        config = self._config
        inputs = self._sessions["decoder"].get_inputs()
        in_halves = any(each.type == "tensor(float16)" for each in inputs)
        shape = (rows, config.kv_heads, width, config.head_dim)
        empty = np.zeros(shape, dtype=np.float16 if in_halves else np.float32)
        buffers: dict[str, NDArray[np.generic]] = {
            f"{part}_{layer}": empty for part in ("k", "v") for layer in range(config.n_decoder_layers)
        }
        if any(each.name == "total" for each in inputs):
            buffers["total"] = np.array(width, dtype=np.int32)
        return {"positions": np.zeros(rows, dtype=np.int64), **buffers}

    def _outputs(self, name: str, feeds: dict[str, NDArray[np.generic]]) -> Outputs:
        session = self._sessions[name]
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    keep_products_exact(options)
    options.log_severity_level = 3  # else every layer would warn that its buffers are not updated in place here
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
