"""LitServe serving one of the starters on ONNX Runtime. Runs in the environment `http`.

    python -m loadtests.peers.litserve_server FOLDER PORT WORKERS THREADS BATCH

The same graphs, the same tokenizer and the same session options as the service's, batched as LitServe batches: what
waits is computed together, and the next batch begins when all of it has ended. Knows the graphs' inputs as
``models/graph.py`` states them, and nothing of the service.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

_BATCH_WAIT_S = 0.002
_KEYS = 16
"""The decoder's buffers hold a multiple of this many tokens."""


class Starter(litserve.LitAPI):  # type: ignore[misc]
    """One of the starters."""

    def __init__(self, folder: Path, threads: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=_BATCH_WAIT_S)
        self._folder, self._threads = folder, threads

    def setup(self, device: str) -> None:
        """Load everything, in the worker's process."""
        self._manifest = json.loads((self._folder / "manifest.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._manifest["max_input_tokens"])
        self._pad = self._manifest["special_ids"]["pad"]
        self._writes = self._manifest["tasks"] == ["translate"]
        self._open()

    def decode_request(self, request: dict[str, Any]) -> str:
        """The text."""
        return str(request["input"])

    def batch(self, inputs: list[str]) -> list[list[int]]:
        """The texts' token ids."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(inputs)]

    def predict(self, rows: Any) -> list[Any]:
        """Labels or texts, one for each row."""
        if isinstance(rows, str):  # LitServe hands over the text itself where it does not batch
            return self.predict(self.batch([rows]))[0]  # type: ignore[no-any-return]
        if self._writes:
            return self._tokenizer.decode_batch(self._translate(rows))
        return [self._manifest["labels"][place] for place in self._logits(rows).argmax(-1)]

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Each row's own."""
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The answer's body."""
        return {"output": output}

    def _open(self) -> None:
        """Load what computes."""
        names = ("encoder", "decoder") if self._writes else ("model",)
        self._sessions = {name: _session(self._folder / f"{name}.onnx", self._threads) for name in names}

    def _logits(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Of the labels, ``(rows, labels)``."""
        return self._encode("model", rows)["logits"]

    def _encode(self, name: str, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
        ids, lengths = self._padded(rows)
        session = self._sessions[name]
        feeds = {"input_ids": ids, "lengths": lengths}
        if any(each.name == "token_types" for each in session.get_inputs()):
            feeds["token_types"] = np.zeros_like(ids)
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Right-padded ids ``(rows, width)``, and how many of each row are its own."""
        width = -(-max(map(len, rows)) // 4) * 4
        ids = np.full((len(rows), width), self._pad, np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
        return ids, np.array([len(row) for row in rows])

    def _translate(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Greedy; the keys and values are updated in place."""
        special, config = self._manifest["special_ids"], self._manifest["config"]
        limit = self._manifest["generation"]["max_tokens"]
        count, capacity = len(rows), -(-(limit + 1) // _KEYS) * _KEYS
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.full((count, 1), special["bos"], np.int64),
            "positions": np.zeros(count, np.int64),
            "lengths": np.ones(count, np.int64),
            "source_lengths": np.array([len(row) for row in rows]),
        }
        crosses = self._encode("encoder", rows)
        feeds |= crosses
        session = self._sessions["decoder"]
        logits = np.empty((count, config["vocab_size"]), np.float32)
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        shape = (count, config["n_heads"], capacity, config["d_model"] // config["n_heads"])
        # What is bound must be kept: ONNX Runtime holds no reference to the memory.
        memory = {
            f"{kind}_{i}": np.zeros(shape, np.float32) for i in range(config["n_decoder_layers"]) for kind in "kv"
        }
        for name, array in memory.items():
            buffer = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(f"new_{name}", buffer)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        texts: list[list[int]] = [[] for _ in rows]
        writing = set(range(count))
        while writing:
            session.run_with_iobinding(binding)
            tokens = logits.argmax(-1)
            feeds["input_ids"][:, 0] = tokens
            feeds["positions"] += 1
            for row in list(writing):
                if tokens[row] != special["eos"]:
                    texts[row].append(int(tokens[row]))
                if tokens[row] == special["eos"] or len(texts[row]) == limit:
                    writing.remove(row)
        return texts


def _session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False
    # Elsewhere 8-bit products overflow unless they are asked to be exact, and texts come out wrong.
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    if not {"avx512_vnni", "avx_vnni"} & set(flags):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def main(kind: type[Starter] = Starter) -> None:
    """Serve until a signal comes."""
    folder, port, workers, threads, batch = sys.argv[1:]
    api = kind(Path(folder), int(threads), int(batch))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=120)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
