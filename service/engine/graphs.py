"""The graphs of a model on ONNX Runtime: arrays in, arrays out. Knows nothing of requests.

``models/graph.py`` writes the graphs and says what their inputs and outputs are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.config import TransformerConfig
from service.engine.batching import padded_width

KEY_BLOCK = 16
"""Buffers hold a multiple of this many tokens, as the graphs attend to a multiple of it (``models/graph.py``)."""

Ids = NDArray[np.int64]


def open_graph(path: Path, threads: int) -> ort.InferenceSession:
    """Load a graph. A session of one thread may be run by several threads at once: each computes on its own."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the core from whoever has work, and their energy is nobody's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Shapes differ from step to step: a plan of memory for each of them would only pile up.
    options.enable_mem_pattern = False
    return ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        # Its kernel is eight times slower than the two that it replaces.
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Ids, Ids]:
    """Right-pad ``rows`` to one width; returns them ``(rows, width)`` and their lengths ``(rows,)``."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    padded = np.full((len(rows), padded_width(int(lengths.max()))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, lengths


class EncoderGraph:
    """``model.onnx`` or ``encoder.onnx``: whole sequences, no state."""

    def __init__(self, session: ort.InferenceSession, pad_id: int) -> None:
        self._session, self._pad_id = session, pad_id
        self._outputs = [output.name for output in session.get_outputs()]
        self._takes_types = any(each.name == "token_types" for each in session.get_inputs())

    def run(
        self, rows: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] = ()
    ) -> dict[str, NDArray[np.float32]]:
        """The graph's outputs by name, for ``rows`` of ids and, where the model has them, their types."""
        ids, lengths = pad(rows, self._pad_id)
        feeds = {"input_ids": ids, "lengths": lengths}
        if self._takes_types:
            types = np.zeros_like(ids)
            for i, row in enumerate(token_types):
                types[i, : len(row)] = row
            feeds["token_types"] = types
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


class DecoderGraph:
    """``decoder.onnx`` and its rows: for each the keys and values of what it has read, updated in place.

    Row axis first: only contiguous slices of an array can be lent to ONNX Runtime without a copy. The buffers are
    address space until somebody writes in them: rows and positions that were never used take no memory.
    """

    def __init__(self, session: ort.InferenceSession, config: TransformerConfig, pad_id: int, n_rows: int) -> None:
        self._session, self._pad_id, self._extracts = session, pad_id, config.extract_head
        shape = (n_rows, -(-config.max_positions // KEY_BLOCK) * KEY_BLOCK, config.kv_width)

        def buffers(*names: str) -> dict[str, NDArray[Any]]:
            layers = range(config.n_decoder_layers)
            return {f"{name}_{layer}": np.zeros(shape, dtype=np.float32) for layer in layers for name in names}

        self._memory = buffers("k", "v")
        self._lengths: dict[str, NDArray[Any]] = {}
        """Of each row's prefix or source."""
        self._cross: dict[str, NDArray[Any]] = {}
        """What each row knows of its source."""
        if config.architecture == "prefix-lm":
            self._lengths["prefix_lengths"] = np.ones(n_rows, dtype=np.int64)
        if config.architecture == "encoder-decoder":
            self._lengths["source_lengths"] = np.ones(n_rows, dtype=np.int64)
            self._cross = buffers("cross_k", "cross_v")
        self.positions = np.zeros(n_rows, dtype=np.int64)
        """How many tokens each row has read."""
        self._next_ids = np.zeros((n_rows, 1), dtype=np.int64)
        self._ones = np.ones(n_rows, dtype=np.int64)
        self._logits = np.empty((n_rows, config.vocab_size), dtype=np.float32)
        self._single_steps: dict[int, ort.IOBinding] = {}

    def prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Let the rows from ``first`` on read one prompt each, from their beginning; a prefix LM reads it as a prefix.

        Returns logits ``(rows, words)``, valid until the next call, and what an extract head says, ``(rows, width)``.
        """
        ids, lengths = pad(prompts, self._pad_id)
        end = first + len(prompts)
        self.positions[first:end] = 0
        if "prefix_lengths" in self._lengths:
            self._lengths["prefix_lengths"][first:end] = lengths
        extracted = np.empty(ids.shape, dtype=np.float32)
        binding = self._bind(first, end, ids, lengths)
        if self._extracts:
            binding.bind_ortvalue_output("extract_logits", ort.OrtValue.ortvalue_from_numpy(extracted))
        self._session.run_with_iobinding(binding)
        self.positions[first:end] = lengths
        return self._logits[first:end], extracted

    def step(self, next_ids: Sequence[int]) -> NDArray[np.float32]:
        """Let each of the first rows read one token; returns logits ``(rows, words)``, valid until the next call."""
        n = len(next_ids)
        self._next_ids[:n, 0] = next_ids
        if n not in self._single_steps:
            self._single_steps[n] = self._bind(0, n, self._next_ids[:n], self._ones[:n])
        self._session.run_with_iobinding(self._single_steps[n])
        self.positions[:n] += 1
        return self._logits[:n]

    def know_source(self, row: int, length: int, cross: Mapping[str, NDArray[np.float32]]) -> None:
        """Let ``row`` start a text over a source of ``length`` tokens; ``cross`` holds its ``cross_*`` ``(t, d)``."""
        self.positions[row] = 0
        self._lengths["source_lengths"][row] = length
        for name, values in cross.items():
            self._cross[name][row, :length] = values[:length]

    def context(self, row: int) -> int:
        """How many tokens ``row`` attends to besides the one that it reads: its text and its source."""
        source = self._lengths.get("source_lengths")
        return int(self.positions[row]) + (0 if source is None else int(source[row]))

    def fork(self, source: int, target: int) -> None:
        """Let ``target`` go on where ``source`` stands; both are rows of one text, so they know the same source."""
        read = int(self.positions[source])
        self.positions[target] = read
        for buffer in self._memory.values():
            buffer[target, :read] = buffer[source, :read]
        for lengths in self._lengths.values():
            lengths[target] = lengths[source]

    def move(self, source: int, target: int) -> None:
        """Let ``target`` be what ``source`` is, with all that it knows."""
        self.fork(source, target)
        for cross in self._cross.values():
            length = int(self._lengths["source_lengths"][source])
            cross[target, :length] = cross[source, :length]

    def _bind(self, first: int, end: int, ids: Ids, lengths: Ids) -> ort.IOBinding:
        binding = self._session.io_binding()
        rows = slice(first, end)
        inputs = {"input_ids": ids, "lengths": lengths, "positions": self.positions[rows]}
        inputs |= {name: array[rows] for name, array in (self._lengths | self._cross).items()}
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, buffer in self._memory.items():
            value = ort.OrtValue.ortvalue_from_numpy(buffer[rows])
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"new_{name}", value)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits[rows]))
        return binding
