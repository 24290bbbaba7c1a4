"""LitServe serving one of the starters on ONNX Runtime. Runs in the environment `http`.

    python -m loadtests.peers.litserve_server FOLDER PORT WORKERS THREADS BATCH MAX_TOKENS

The same graphs, the same tokenizer and the same session options as the service's, batched as LitServe batches: what
waits is computed together, and the next batch begins when all of it has ended. Texts are written greedily, with
MAX_TOKENS at most, or where that is 0 with as many as the manifest says. Knows the graphs' inputs as
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

    def __init__(self, folder: Path, threads: int, batch: int, max_tokens: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=_BATCH_WAIT_S)
        self._folder, self._threads, self._max_tokens = folder, threads, max_tokens

    def setup(self, device: str) -> None:
        """Load everything, in the worker's process."""
        self._manifest = json.loads((self._folder / "manifest.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self._manifest["max_input_tokens"])
        self._pad = self._manifest["special_ids"]["pad"]
        self._max_tokens = self._max_tokens or (self._manifest["generation"] or {}).get("max_tokens", 0)
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
        if labels := self._manifest["labels"]:
            return [labels[place] for place in self._logits(rows).argmax(-1)]
        return self._tokenizer.decode_batch(self._write(rows))

    def unbatch(self, output: list[Any]) -> list[Any]:
        """Each row's own."""
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The answer's body."""
        return {"output": output}

    def _open(self) -> None:
        """Load what computes."""
        paths = (self._folder / f"{name}.onnx" for name in ("model", "encoder", "decoder"))
        self._sessions = {path.stem: _session(path, self._threads) for path in paths if path.exists()}

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

    def _write(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Texts over or behind ``rows``; the keys and values are updated in place."""
        special, config = self._manifest["special_ids"], self._manifest["config"]
        count = len(rows)
        fixed: dict[str, NDArray[Any]] = {}
        if "encoder" in self._sessions:
            fixed = {**self._encode("encoder", rows), "source_lengths": np.array([len(row) for row in rows])}
            ids, lengths = np.full((count, 1), special["bos"], np.int64), np.ones(count, np.int64)
        else:
            ids, lengths = self._padded(rows)
        heads, size = config["n_kv_heads"] or config["n_heads"], config["d_model"] // config["n_heads"]
        shape = (count, heads, -(-(ids.shape[1] + self._max_tokens) // _KEYS) * _KEYS, size)
        # What is bound must be kept: ONNX Runtime holds no reference to the memory.
        names = [f"{kind}_{i}" for i in range(config["n_decoder_layers"]) for kind in "kv"]
        memory = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names}
        logits, positions = np.empty((count, config["vocab_size"]), np.float32), np.zeros(count, np.int64)

        def bound(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> ort.IOBinding:
            binding = self._sessions["decoder"].io_binding()
            inputs = {"input_ids": ids, "lengths": lengths, "positions": positions, **fixed}
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            for name, buffer in memory.items():
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(f"new_{name}", buffer)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            return binding

        self._sessions["decoder"].run_with_iobinding(bound(ids, lengths))
        positions += lengths
        next_ids, ones = np.empty((count, 1), np.int64), np.ones(count, np.int64)
        step = bound(next_ids, ones)
        texts: list[list[int]] = [[] for _ in rows]
        writing = set(range(count))
        while True:
            tokens = logits.argmax(-1)
            for row in list(writing):
                if tokens[row] != special["eos"]:
                    texts[row].append(int(tokens[row]))
                if tokens[row] == special["eos"] or len(texts[row]) == self._max_tokens:
                    writing.remove(row)
            if not writing:
                return texts
            next_ids[:, 0] = tokens
            self._sessions["decoder"].run_with_iobinding(step)
            positions += 1


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
    folder, *numbers = sys.argv[1:]
    port, workers, threads, batch, max_tokens = map(int, numbers)
    api = kind(Path(folder), threads, batch, max_tokens)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=120)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
