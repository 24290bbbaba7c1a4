"""The graphs of a model on ONNX Runtime: arrays in, arrays out. Knows nothing of requests.

``models/graph.py`` writes the graphs and says what their inputs and outputs are.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.config import TransformerConfig
from models.processor import keep_products_exact
from service.engine.batching import padded_width
from service.engine.buffers import KEY_BLOCK, Buffers, Floats, Move
from service.engine.devices import CPU, Device, DeviceLogits, DeviceRows, Logits, Recording, Region, not_recorded

Ids = NDArray[np.int64]
_MANY = 16
"""On a device texts are filled up to a power of two, and more than these to one and a half times one, too."""


def open_graph(path: Path, threads: int, device: Device = CPU, weight_bits: int = 8) -> ort.InferenceSession:
    """Load a graph, whose weights have ``weight_bits``, onto ``device``.

    A session of one thread may be run by several threads at once: each computes on its own.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Within a step a thread that slept would wake too late for its part of the next product. Between steps, threads
    # that spin take the core from whoever has work, and their energy is nobody's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Shapes differ from step to step: a plan of memory for each of them would only pile up.
    options.enable_mem_pattern = False
    keep_products_exact(options, weight_bits)
    return ort.InferenceSession(
        path,
        options,
        providers=device.providers(records=path.name == "decoder.onnx"),
        # Its kernel is eight times slower than the two that it replaces.
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def pad(rows: Sequence[Sequence[int]], value: int, width: int | None = None) -> tuple[Ids, Ids]:
    """Right-pad ``rows`` to one width, by default the least.

    Returns them ``(rows, width)`` and their lengths ``(rows,)``.
    """
    lengths = [len(row) for row in rows]
    width = width or padded_width(max(lengths))
    padded = [[*row, *[value] * (width - length)] for row, length in zip(rows, lengths, strict=True)]
    return np.array(padded, dtype=np.int64), np.array(lengths, dtype=np.int64)


class EncoderGraph:
    """``model.onnx`` or ``encoder.onnx``: whole sequences, no state."""

    def __init__(self, session: ort.InferenceSession, pad_id: int) -> None:
        self._session, self._pad_id = session, pad_id
        self._outputs = [output.name for output in session.get_outputs()]
        self._takes_types = any(each.name == "token_types" for each in session.get_inputs())

    def run(self, rows: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]] = ()) -> dict[str, Floats]:
        """The graph's outputs by name, for ``rows`` of ids and, where the model has them, their types."""
        feeds = self._feeds(rows, token_types, None)
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def run_into(self, rows: Sequence[Sequence[int]], regions: Mapping[str, Region], width: int) -> None:
        """See ``SourceReader``."""
        binding = self._session.io_binding()
        for name, array in self._feeds(rows, (), width).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, region in regions.items():
            region.bind_output(binding, name)
        self._session.run_with_iobinding(binding)

    def _feeds(
        self, rows: Sequence[Sequence[int]], token_types: Sequence[Sequence[int]], width: int | None
    ) -> dict[str, Ids]:
        ids, lengths = pad(rows, self._pad_id, width)
        feeds = {"input_ids": ids, "lengths": lengths}
        if self._takes_types:
            types = np.zeros_like(ids)
            for i, row in enumerate(token_types):
                types[i, : len(row)] = row
            feeds["token_types"] = types
        return feeds


class HostRows(Buffers):
    """Keys and values in arrays of this process."""

    def bind(self, binding: ort.IOBinding, rows: slice, *, updated: bool) -> None:
        """See ``Rows``."""
        for name, array in self.arrays.items():
            value = ort.OrtValue.ortvalue_from_numpy(array[rows])
            binding.bind_ortvalue_input(name, value)
            if updated:
                binding.bind_ortvalue_output(f"new_{name}", value)

    def read(self, first: int, sources: Sequence[Sequence[int]], encoder: EncoderGraph) -> None:
        """See ``Rows``. The same source in several rows is read once."""
        places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, sources)))}
        crosses = encoder.run(list(places))
        each = [places[tuple(ids)] for ids in sources]
        end, width = first + len(sources), max(map(len, sources))
        for name, array in self.arrays.items():
            cross = crosses[name] if len(places) == len(sources) else crosses[name][each]
            array[first:end, :, :width] = cross[:, :, :width]


class Rows(Protocol):
    """Where rows keep keys and values; ``Buffers`` says what its methods do."""

    capacity: int
    """Tokens for which a row has room."""

    def reserve(self, tokens: int, used: int) -> bool:
        """See ``Buffers``."""

    def copy(self, moves: Sequence[Move]) -> None:
        """See ``Buffers``."""

    def adopt(self, row: int, other: Any, end: int) -> None:
        """See ``Buffers``; ``other`` is of the same kind."""

    def bind(self, binding: ort.IOBinding, rows: slice, *, updated: bool) -> None:
        """Let a graph read ``rows``, and where they are ``updated`` write them in place."""

    def read(self, first: int, sources: Sequence[Sequence[int]], encoder: EncoderGraph) -> None:
        """Let the rows from ``first`` on hold what ``encoder`` makes of ``sources``."""


class DecoderGraph:
    """``decoder.onnx`` and the texts that it writes: for each row the keys and values of what it has read.

    Every text has ``beams`` neighbouring rows, which share what they know of a source. The graph updates the rows'
    buffers in place; row axis first, as only contiguous slices of an array can be lent to ONNX Runtime without a copy.
    On a device buffers and logits stay there, and only token ids come back.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        config: TransformerConfig,
        pad_id: int,
        n_texts: int,
        beams: int = 1,
        source: EncoderGraph | None = None,
        device: Device | None = None,
        records: bool = False,
    ) -> None:
        """``source`` is the encoder of an encoder-decoder; without a ``device`` the memory is this process's.

        What a session ``records`` it never forgets.
        """
        self._session, self._pad_id, self._extracts = session, pad_id, config.extract_head
        self.beams = beams
        n_rows = n_texts * beams
        names = [f"{part}_{layer}" for layer in range(config.n_decoder_layers) for part in ("k", "v")]
        self._device, self._source = device, source
        self._memory = _rows(device, names, n_rows, config, grows=True)
        self._cross: Rows | None = None
        """What each text knows of its source."""
        self._lengths: dict[str, Ids] = {}
        """Of each row's prefix or each text's source."""
        if config.architecture == "prefix-lm":
            self._lengths["prefix_lengths"] = np.ones(n_rows, dtype=np.int64)
        if config.architecture == "encoder-decoder":
            self._lengths["source_lengths"] = np.ones(n_texts, dtype=np.int64)
            self._cross = _rows(device, [f"cross_{name}" for name in names], n_texts, config, grows=False)
        self.positions = np.zeros(n_rows, dtype=np.int64)
        """How many tokens each row has read."""
        self._next_ids = np.zeros((n_rows, 1), dtype=np.int64)
        self._ones = np.ones(n_rows, dtype=np.int64)
        self._n_words = config.vocab_size
        self._logits = np.empty((n_rows if device is None else 0, self._n_words), dtype=np.float32)
        self._tokens = np.zeros(n_rows, dtype=np.int64)
        """What follows each prompt, where a device says it."""
        self._takes_total = any(each.name == "total" for each in session.get_inputs())
        self._records = records
        self._recordings: dict[int, Recording] = {}
        """Steps on a device, by the number of rows."""
        self._position_cells, self._ids_cells = self.positions.data, self._next_ids[:, 0].data
        self._single_steps: dict[int, ort.IOBinding] = {}
        """By the number of rows, as long as their buffers stay where they are."""
        self._room = 0
        """So many more tokens fit into every row for certain."""

    def prefill(self, used: int, prompts: Sequence[Sequence[int]]) -> tuple[Logits, Floats]:
        """Let texts behind the ``used`` rows read a prompt each, from its beginning; a prefix LM reads it as a prefix.

        Each text's first row reads, the others have to be copied from it. Returns logits ``(texts, words)``, valid
        until the next call, and what an extract head says, ``(texts, width)``.
        """
        ids, lengths = pad(prompts, self._pad_id)
        self._reserve(self._memory, ids.shape[1], used)
        rows = slice(used, used + len(prompts))
        self.positions[rows] = 0
        if "prefix_lengths" in self._lengths:
            self._lengths["prefix_lengths"][rows] = lengths
        extracted = np.empty(ids.shape, dtype=np.float32)
        binding = self._bind(rows, ids, lengths)
        if self._extracts:
            binding.bind_ortvalue_output("extract_logits", ort.OrtValue.ortvalue_from_numpy(extracted))
        logits = self._run(binding, rows)
        self.positions[rows] = lengths
        if self.beams > 1:
            # They read side by side; from the last to the first, each moves to where its text's rows are.
            logits = logits.copy()
            numbers = range(len(prompts) - 1, -1, -1)
            self.copy([(used + number, used + number * self.beams, 0) for number in numbers])
            for number in numbers:
                self._align(used // self.beams + number)
        return logits, extracted

    def forget(self) -> None:
        """Let the first row read its prompt from the beginning."""
        self.positions[0] = 0

    def read_on(self, chunk: Sequence[int]) -> Logits:
        """Let the only row read more of its prompt; returns logits ``(1, words)``, valid until the next call."""
        ids, lengths = np.array([chunk], dtype=np.int64), np.array([len(chunk)], dtype=np.int64)
        self._reserve(self._memory, int(self.positions[0]) + len(chunk), 1)
        logits = self._run(self._bind(slice(0, 1), ids, lengths), slice(0, 1))
        self.positions[0] += len(chunk)
        return logits

    def step(self, next_ids: Sequence[int] | Ids) -> Logits:
        """Let each of the first rows read one token; returns logits ``(rows, words)``, valid until the next call."""
        n = len(next_ids)
        if self._device is not None:
            return self._step_on(self._device, next_ids)
        if not self._room:
            longest = max(self._position_cells[:n])
            self._reserve(self._memory, longest + 1, n)
            self._room = self._memory.capacity - longest
        self._room -= 1
        rows = slice(0, n)
        # Cell by cell: a graph leaves little in the caches, and then an operation of NumPy takes 25 microseconds.
        for row, token in enumerate(next_ids):
            self._ids_cells[row] = token
        if n not in self._single_steps:
            self._single_steps[n] = self._bind(rows, self._next_ids[rows], self._ones[rows])
        logits = self._run(self._single_steps[n], rows)
        for row in range(n):
            self._position_cells[row] += 1
        return logits

    def padding_rows(self, used: int) -> int:
        """How many free rows step along with the ``used`` ones, from nothing, so that a few recordings are enough."""
        if self._device is None:
            return 0
        texts = used // self.beams
        recorded = 1 << (texts - 1).bit_length()
        if _MANY < texts <= recorded * 3 // 4:
            recorded = recorded * 3 // 4
        return min(recorded * self.beams, len(self.positions)) - used

    def warm_up(self) -> None:
        """Have whatever the first steps would wait for."""
        rows = len(self.positions)
        for texts in range(1, rows // self.beams + 1) if self._device is not None else (1,):
            used = texts * self.beams
            if not self.padding_rows(used):
                self.step([0] * used)
        self.positions[:] = 0

    def _step_on(self, device: Device, next_ids: Sequence[int] | Ids) -> Logits:
        n = len(next_ids)
        rows = slice(0, n + self.padding_rows(n))
        texts = self._texts(rows)
        ids, positions = np.zeros((rows.stop, 1), dtype=np.int64), self.positions[rows].copy()
        ids[:n, 0], positions[n:] = next_ids, 0
        inputs = {"input_ids": ids, "positions": positions}
        inputs |= {name: array[rows if self._cross is None else texts] for name, array in self._lengths.items()}
        if rows.stop not in self._recordings:
            outputs: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
                "logits": ((rows.stop, self._n_words), np.float32),
                "tokens": ((rows.stop,), np.int64),
            }
            inputs_once = {**inputs, "lengths": self._ones[rows]}
            made = Recording(device, self._session, inputs_once, outputs, records=self._records)
            self._bind_total(made.binding, self._memory.capacity)
            self._bind_rows(made.binding, rows)
            self._recordings[rows.stop] = made
        recording = self._recordings[rows.stop]
        recording.run(inputs)
        self.positions[:n] += 1
        return DeviceLogits(recording.outputs["logits"], recording.outputs["tokens"].numpy()[:n])

    def read_sources(self, first: int, sources: Sequence[Sequence[int]]) -> None:
        """Let texts from ``first`` on start over ``sources``."""
        assert self._cross is not None and self._source is not None
        end, lengths = first + len(sources), [len(source) for source in sources]
        self._reserve(self._cross, max(lengths), first)
        self.positions[first * self.beams : end * self.beams] = 0
        self._lengths["source_lengths"][first:end] = lengths
        self._cross.read(first, sources, self._source)

    def contexts(self, n_texts: int) -> list[int]:
        """How many tokens the rows of each of the first texts attend to together, besides those that they read."""
        cells, beams = self._position_cells, self.beams
        if self._cross is None:
            return [beams * cells[text * beams] for text in range(n_texts)]
        sources = self._lengths["source_lengths"].data
        return [beams * (cells[text * beams] + sources[text]) for text in range(n_texts)]

    def copy(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """One after the other let a row, the second of a copy, go on where the first stands; up to the third of its
        tokens it already holds the same."""
        moves = []
        for source, target, start in copies:
            self.positions[target] = self.positions[source]
            if "prefix_lengths" in self._lengths:
                self._lengths["prefix_lengths"][target] = self._lengths["prefix_lengths"][source]
            moves.append(Move(source, target, start, int(self.positions[source])))
        self._memory.copy(moves)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """One after the other let a text, the second of a move, be what the first is, with all that it knows."""
        rows = range(self.beams)
        self.copy(
            (source * self.beams + row, target * self.beams + row, 0) for source, target in moves for row in rows
        )
        if self._cross is not None:
            lengths = self._lengths["source_lengths"]
            known = []
            for source, target in moves:
                lengths[target] = lengths[source]
                known.append(Move(source, target, 0, int(lengths[source])))
            self._cross.copy(known)

    def adopt(self, text: int, reader: "DecoderGraph") -> None:
        """Let the first row of ``text`` go on behind what ``reader``, which has one row, has read."""
        self._place(text, int(reader.positions[0]))
        self._memory.adopt(text * self.beams, reader._memory, int(reader.positions[0]))

    def remember(self, text: int) -> list[Floats]:
        """Copies of the keys and values of what the first row of ``text`` has read; on the host alone."""
        assert isinstance(self._memory, Buffers)
        row = text * self.beams
        return self._memory.get(row, int(self.positions[row]))

    def recall(self, text: int, memory: Sequence[Floats]) -> None:
        """Let the first row of ``text`` go on behind what ``remember`` returned, or the beginning of it."""
        assert isinstance(self._memory, Buffers)
        self._place(text, memory[0].shape[1])
        self._memory.put(text * self.beams, memory)

    def _place(self, text: int, length: int) -> None:
        """Let ``text``, behind all others, stand after so many tokens."""
        row = text * self.beams
        self._reserve(self._memory, length, row)
        self.positions[row] = length
        self._align(text)

    def _align(self, text: int) -> None:
        """All rows of ``text`` stand where its first one stands; what they hold is copied as beams part."""
        row = text * self.beams
        self.positions[row : row + self.beams] = self.positions[row]
        if "prefix_lengths" in self._lengths:
            lengths = self._lengths["prefix_lengths"]
            lengths[row : row + self.beams] = lengths[row]

    def _reserve(self, rows: Rows, tokens: int, used: int) -> None:
        if rows is self._memory:
            self._room = 0
        if rows.reserve(tokens, used):
            self._single_steps.clear()

    def _run(self, binding: ort.IOBinding, rows: slice) -> Logits:
        if self._device is None:
            self._session.run_with_iobinding(binding)
            return self._logits[rows]
        self._session.run_with_iobinding(binding, not_recorded())
        return DeviceLogits(binding.get_outputs()[0], self._tokens[rows])

    def _bind(self, rows: slice, ids: Ids, lengths: Ids) -> ort.IOBinding:
        binding = self._session.io_binding()
        if self._device is None:
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits[rows]))
        else:
            binding.bind_output("logits", self._device.kind, self._device.index)
            binding.bind_ortvalue_output("tokens", ort.OrtValue.ortvalue_from_numpy(self._tokens[rows]))
            self._bind_total(binding, int(self.positions[rows].max()) + ids.shape[1])
        known = rows if self._cross is None else self._texts(rows)
        inputs = {"input_ids": ids, "lengths": lengths, "positions": self.positions[rows]}
        for name, array in (inputs | {name: array[known] for name, array in self._lengths.items()}).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._bind_rows(binding, rows)
        return binding

    def _bind_total(self, binding: ort.IOBinding, total: int) -> None:
        if self._takes_total:
            binding.bind_cpu_input("total", np.array(total, dtype=np.int32))

    def _bind_rows(self, binding: ort.IOBinding, rows: slice) -> None:
        self._memory.bind(binding, rows, updated=True)
        if self._cross is not None:
            self._cross.bind(binding, self._texts(rows), updated=False)

    def _texts(self, rows: slice) -> slice:
        return slice(rows.start // self.beams, rows.stop // self.beams)


def _rows(device: Device | None, names: Sequence[str], count: int, config: TransformerConfig, *, grows: bool) -> Rows:
    if device is None:
        return HostRows(names, count, config.kv_heads, config.head_dim, config.max_positions, grows=grows)
    capacity = -(-config.max_positions // KEY_BLOCK) * KEY_BLOCK
    return DeviceRows(device, names, (count, config.kv_heads, capacity, config.head_dim))


class BeamGraph:
    """``beams.onnx``: the likeliest words of each row."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session

    def likeliest(self, logits: Logits, count: int) -> tuple[Floats, Ids]:
        """Log probabilities and words ``(rows, count)``, best first."""
        names, counts = ["log_probabilities", "words"], np.array([count], dtype=np.int64)
        if isinstance(logits, DeviceLogits) and logits.value is not None:
            binding = self._session.io_binding()
            binding.bind_ortvalue_input("logits", logits.value)
            binding.bind_cpu_input("count", counts)
            for name in names:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            scores, words = (each[: len(logits)] for each in binding.copy_outputs_to_cpu())
        else:
            scores, words = self._session.run(names, {"logits": np.asarray(logits), "count": counts})
        return scores, words


class WriteGraphs:
    """All graphs of a model that writes."""

    def __init__(
        self,
        config: TransformerConfig,
        pad_id: int,
        decoder: ort.InferenceSession,
        beams: ort.InferenceSession,
        source: ort.InferenceSession | None,
        device: Device | None = None,
    ) -> None:
        self._session, self._config, self._pad_id, self._device = decoder, config, pad_id, device
        self.beams = BeamGraph(beams)
        self.source = None if source is None else EncoderGraph(source, pad_id)
        """What reads the sources of an encoder-decoder; other models read prompts."""

    @property
    def on_device(self) -> bool:
        """Whether what a decoder keeps is on a device, where all of it is taken at once."""
        return self._device is not None

    @cached_property
    def reader(self) -> DecoderGraph:
        """Reads one prompt at a time."""
        return self.decoder(1, 1)

    def decoder(self, n_texts: int, beams: int, *, records: bool = False) -> DecoderGraph:
        """New buffers for ``n_texts`` texts, whose steps a device ``records`` for as long as this lives."""
        device = self._device
        return DecoderGraph(self._session, self._config, self._pad_id, n_texts, beams, self.source, device, records)
