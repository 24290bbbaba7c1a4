"""The ONNX graphs of a Transformer, built straight from its weights: one helper per op, one loop per layer.

Knows nothing of PyTorch or training: float32 arrays, named as in ``models.transformer.Transformer.state_dict()``, go
in; files come out. ``models/transformer.py`` is the reference that these graphs repeat; for the llama and marian
styles and the heads of imported encoders it is the transformers library (``training/families.py``). A module has a
bias where there is an array of that name, and an output layer of its own where there is a ``head.out``. Shapes in
comments: ``b`` rows, ``s`` tokens of a chunk, ``n`` real tokens of all rows, ``c`` capacity of a buffer, ``d`` model
width, ``h`` heads, ``g`` heads of keys and values (``h`` where no query heads share one), ``e`` head size.

Inputs are int64 and padded on the right; outputs are float32 unless said otherwise.

- ``model.onnx`` (encoder): ``input_ids`` (b, s), ``lengths`` (b,), with the bert style ``token_types`` (b, s)
  -> ``logits``: (b, labels), or (b, s, 2) of a span head, or (b, d) of an embed head; with l ``vector_layers``
  ``vector`` (b, l * d).
- ``encoder.onnx`` (encoder-decoder): ``input_ids``, ``lengths`` -> ``cross_k_{i}``, ``cross_v_{i}`` (b, h, s, e), the
  keys and values that layer i of the decoder attends to.
- ``decoder.onnx``: ``input_ids`` (b, s); ``positions`` (b,), where in its text each row's chunk starts; ``lengths``
  (b,), real tokens of the chunk; ``k_{i}``, ``v_{i}`` (b, g, c, e), what was read before, with ``c`` no less than any
  start plus s; a prefix LM adds ``prefix_lengths`` (b,), which its first chunk must hold; an encoder-decoder adds
  ``cross_k_{i}``, ``cross_v_{i}`` (b', h, c', e) and ``source_lengths`` (b',), where b is a multiple of b': as many
  neighbouring rows, the beams of one text, share a source. -> ``logits`` (b, words) at the last real token, with an
  extract head ``extract_logits`` (b, s), and ``new_k_{i}``, ``new_v_{i}`` (b, g, c, e): bind them to the memory of
  ``k_{i}``, ``v_{i}``, which are then updated in place.

- ``beams.onnx``, beside every decoder: ``logits`` (b, words), ``count`` (1,) -> ``log_probabilities`` and ``words``
  (b, count), the likeliest of each row, best first. It has no weights.

A decoder reads whole prompts (all positions 0), single tokens, and one row's next chunk of a prompt: several rows
that have read something read one token each, as GroupQueryAttention takes no more. Its cost grows with ``c``: keep
the buffers little larger than what they hold.

An encoder works on the real tokens alone; only its attention sees rows padded to one width.

All graphs of a folder share ``weights.bin``, in which every array lies once. A scheme says how matrices are stored:

- ``rowwise``: 8 bits, one float32 scale for each output; a token's activations are quantised with one scale too, and
  products are sums of integers (MatMulIntegerToFloat): twice as fast as blocks on batches. With 7 bits in the same
  bytes no two products overflow 16 bits, which processors without VNNI add them in: there it is a fifth faster still
  (``models/processor.py``).
- ``calibrated``: the same, but where ``peaks`` say how large the activations of a matrix become, their scale is fixed,
  and a product takes two nodes in place of eight.
- ``float16``: for GPUs: half-precision weights, hidden states, keys and values (``k_{i}``, ``cross_k_{i}`` and their
  like are float16 too). Its decoder has one more output, ``tokens`` (b,), int64: the likeliest word of each row, so
  that logits need not leave the device. Unless it is a prefix LM's it has one more input, too: ``total`` (), int32,
  the latest start plus s, or c where single tokens are read. GroupQueryAttention wants it on the host, where whoever
  calls knows it: the operator does not wait for the end of a copy from the device, and then attends to nothing.
- ``blockwise``: rows cut into blocks of ``block_size`` with a scale each (MatMulNBits), of 8 or 4 bits: more exact,
  and faster on a single token.

Token and position embeddings have 8 bits, in rows (there as many as the matrices) or blocks; an encoder's may have 4,
in blocks of 32 whatever the scheme, for they are only looked up: no product gets slower by it.

A row gives the same bits alone as in any batch, measured on a CPU with AVX-512, as long as blocks have 64 numbers or
fewer (of 128, MatMulNBits sums a single row in another order), buffers hold a multiple of ``KEY_BLOCK`` (of a source:
of four), and texts are padded to a multiple of four tokens unless all have one (products of a single row sum in fours,
then one by one).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from models.config import TransformerConfig

WEIGHTS_NAME = "weights.bin"
_OPSETS = {"": 24, "com.microsoft": 1}
TABLE_BLOCKS = {8: 64, 4: 32}
"""Numbers of an embedding that share a scale, by its bits, where it is stored in blocks."""
_ALIGNMENT = 64
_FLOAT = ir.DataType.FLOAT

KEY_BLOCK = 16
"""Buffers hold a multiple of this many tokens, so that one query sums over them in whole groups of four."""

Scheme = Literal["none", "float16", "blockwise", "rowwise", "calibrated"]
Bits = Literal[4, 7, 8]
BITS: Mapping[Scheme, tuple[Bits, ...]] = {"rowwise": (8, 7), "calibrated": (8, 7), "blockwise": (8, 4)}
"""Which a scheme can have, where there is a choice."""


def write_graphs(
    folder: Path,
    config: TransformerConfig,
    weights: Mapping[str, NDArray[np.float32]],
    scheme: Scheme = "none",
    bits: Bits = 8,
    block_size: int = 64,
    peaks: Mapping[str, float] | None = None,
    table_bits: Literal[4, 8] = 8,
) -> list[Path]:
    """Write the graphs of a model and the weights that they share into ``folder``; returns the files written.

    ``bits``, one of ``BITS``, are those of a weight; ``block_size`` (a power of two from 16; halved for a matrix whose
    rows it does not divide) is how many share a scale in ``blockwise``. ``peaks``, by the name of a matrix, say what
    the absolute values that ``calibrated`` multiplies it with do not exceed: larger ones are cut off. ``table_bits``
    are those of embeddings; 4 are for encoders. Raises ``ValueError`` where they are asked of another model, where a
    scheme cannot have ``bits`` and where a row is no multiple of 16, and ``KeyError`` where a weight is missing.
    """
    check_bits(scheme, bits)
    if table_bits == 4 and config.architecture != "encoder":
        raise ValueError("embeddings that are multiplied with too, as a decoder's are, have 8 bits")
    store = _Store(folder / WEIGHTS_NAME, weights, scheme, bits, block_size, peaks or {}, table_bits)
    return _write(folder, config, store)


def write_observed(folder: Path, config: TransformerConfig, weights: Mapping[str, NDArray[np.float32]]) -> list[Path]:
    """Write float32 graphs that also show what ``peaks`` should be; returns the files written.

    Their further outputs ``peaks.{name}`` (m,) are the largest absolute values of the rows that the matrix ``name`` is
    multiplied with.
    """
    store = _Store(folder / WEIGHTS_NAME, weights, "none", 8, 64, {}, observed=True)
    return _write(folder, config, store)


def _write(folder: Path, config: TransformerConfig, store: "_Store") -> list[Path]:
    with store:
        if config.architecture == "encoder":
            graphs: dict[str, _Graph] = {"model.onnx": _encoder(config, store)}
        else:
            graphs = {"decoder.onnx": _decoder(config, store), "beams.onnx": _beams(config, store)}
            if config.architecture == "encoder-decoder":
                graphs["encoder.onnx"] = _source_encoder(config, store)
    for name, graph in graphs.items():
        ir.save(graph.model(), folder / name)
    return [*(folder / name for name in graphs), folder / WEIGHTS_NAME]


def check_bits(scheme: Scheme, bits: int) -> None:
    """Raise ``ValueError`` where ``scheme`` cannot have so many ``bits`` a weight."""
    choice = BITS.get(scheme, (bits,))
    if bits not in choice:
        raise ValueError(f"{scheme} has {' or '.join(map(str, choice))} bits a weight, not {bits}")


def quantize(weight: NDArray[np.float32], bits: int, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Cut the rows of ``weight`` (n, k) into blocks, each with the scale of its largest value.

    Returns codes (n, k / block, block * bits / 8), of 4 bits the lower half first, and scales (n, k / block):
    ``weight = (code - 2 ** (bits - 1)) * scale``, which is what MatMulNBits and GatherBlockQuantized read.
    """
    zero = 1 << (bits - 1)
    blocks = weight.reshape(len(weight), -1, block_size)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    # The peak gets the code 0, whatever its sign: codes reach one step further below zero than above.
    scale = np.where(peak == 0, 1, peak / -zero).astype(np.float32)
    codes = np.clip(np.rint(blocks / scale) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scale[..., 0]


def quantize_rows(weight: NDArray[np.float32], bits: int = 8) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes (n, k), as far above zero as below, and a scale for each row (n,): ``weight = code * scale``."""
    peak = np.abs(weight).max(-1)
    scale = np.where(peak == 0, 1, peak / most_code(bits)).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def most_code(bits: int) -> int:
    """The largest code of a weight in a row that has one scale."""
    return (1 << (bits - 1)) - 1


def fitting_block_size(width: int, block_size: int) -> int:
    """The largest half, quarter, ... of ``block_size`` that cuts a row of ``width`` numbers without a rest."""
    while width % block_size:
        block_size //= 2
    if block_size < 16:
        raise ValueError(f"a row of {width} numbers cannot be cut into blocks of 16 or more")
    return block_size


@dataclass(frozen=True)
class _Blocks:
    """A matrix as ``quantize`` leaves it, in the shapes of MatMulNBits and (flat) GatherBlockQuantized."""

    codes: ir.ExternalTensor
    flat_codes: ir.ExternalTensor
    scales: ir.ExternalTensor
    bits: int
    block_size: int


@dataclass(frozen=True)
class _Rows:
    """A matrix as ``quantize_rows`` leaves it; the codes (n, k), or (k, n) where it is only multiplied with."""

    codes: ir.ExternalTensor
    scales: ir.ExternalTensor


class _Store:
    """The weights, and the file in which every array lies once, whichever graphs and shapes refer to it."""

    def __init__(
        self,
        path: Path,
        weights: Mapping[str, NDArray[np.float32]],
        scheme: Scheme,
        bits: int,
        block_size: int,
        peaks: Mapping[str, float],
        table_bits: Literal[4, 8] = 8,
        *,
        observed: bool = False,
    ) -> None:
        self.weights, self.scheme = weights, scheme
        self.peaks = peaks if scheme == "calibrated" else {}
        self.observed = observed
        self.float_type = ir.DataType.FLOAT16 if scheme == "float16" else ir.DataType.FLOAT
        """Of hidden states, and of weights that are not quantised."""
        self._bits, self._block_size, self.table_bits = bits, block_size, table_bits
        self._path, self._file = path, path.open("wb")
        self._offsets: dict[str, int] = {}
        self._blocks: dict[str, _Blocks] = {}
        self._rows: dict[str, _Rows] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def by_rows(self) -> bool:
        """Whether a row of a matrix has one scale."""
        return self.scheme in ("rowwise", "calibrated")

    def plain(self, name: str, *, transposed: bool = False) -> ir.ExternalTensor:
        """A weight as it is, or in half precision; ``transposed`` is another array, with a place of its own."""
        weight = self.weights[name].astype(self.float_type.numpy(), copy=False)
        return self._tensor(name + ".T", weight.T) if transposed else self._tensor(name, weight)

    def blocks(self, name: str) -> _Blocks:
        """A matrix with the bits and block size of the model."""
        return self._quantised(name, self._bits, self._block_size)

    def table(self, name: str) -> _Blocks:
        """An embedding."""
        return self._quantised(name, self.table_bits, TABLE_BLOCKS[self.table_bits])

    def rows(self, name: str, *, transposed: bool = False) -> _Rows:
        """A matrix with a scale per row."""
        if name not in self._rows:
            codes, scales = quantize_rows(self.weights[name], self._bits)
            key = name + ".codes"
            self._rows[name] = _Rows(
                self._tensor(key + ".T", codes.T) if transposed else self._tensor(key, codes),
                self._tensor(name + ".scales", scales),
            )
        return self._rows[name]

    def _quantised(self, name: str, bits: int, block_size: int) -> _Blocks:
        if name not in self._blocks:
            weight = self.weights[name]
            block_size = fitting_block_size(weight.shape[1], block_size)
            codes, scales = quantize(weight, bits, block_size)
            key = name + ".codes"
            self._blocks[name] = _Blocks(
                codes=self._tensor(key, codes),
                flat_codes=self._tensor(key, codes.reshape(len(weight), -1), alias=key + ".flat"),
                scales=self._tensor(name + ".scales", scales),
                bits=bits,
                block_size=block_size,
            )
        return self._blocks[name]

    def _tensor(
        self, key: str, array: NDArray[np.floating] | NDArray[np.uint8] | NDArray[np.int8], alias: str | None = None
    ) -> ir.ExternalTensor:
        """Write ``array`` unless ``key`` has been written; ``alias`` names the same bytes under another shape."""
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._offsets[key] = self._file.tell()
            self._file.write(np.ascontiguousarray(array).data)
        return ir.ExternalTensor(
            self._path.name,
            self._offsets[key],
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=alias or key,
            base_dir=self._path.parent,
        )


class _Graph:
    """Collects the nodes of one graph; a method per kind of op, none of which knows what a Transformer is."""

    def __init__(self, store: _Store) -> None:
        self.store = store
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._quantised: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        """What several products read is quantised once, with a scale per row."""
        self._fixed: dict[tuple[ir.Value, float], ir.Value] = {}
        """And with a fixed peak."""
        self._not_negative: set[ir.Value] = set()
        """What needs no ``Abs`` before its peaks."""
        self._zero_points: ir.Value | None = None

    def model(self) -> ir.Model:
        """The finished graph."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=tuple(self._initializers.values()),
            opset_imports=_OPSETS,
            name="wattle",
        )
        return ir.Model(graph, ir_version=11, producer_name="wattle")

    def input(self, name: str, *shape: str | int, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def output(
        self, value: ir.Value, name: str, *shape: str | int | None, dtype: ir.DataType = ir.DataType.FLOAT
    ) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def ops(
        self, op: str, *inputs: ir.Value | None, n_outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=n_outputs)
        self._nodes.append(node)
        return list(node.outputs)

    def op(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.ops(op, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def constant(self, value: float | list[int] | list[float], dtype: type[np.generic] = np.int64) -> ir.Value:
        array = np.asarray(value, dtype)
        return self._initializer(ir.tensor(array, name=f"{array.dtype.name}_{array.tolist()}"))

    def number(self, value: float) -> ir.Value:
        """A constant for hidden states."""
        return self.constant(value, self.store.float_type.numpy().type)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``x``, in whichever of the two precisions it is, in ``dtype``."""
        return x if self.store.float_type is ir.DataType.FLOAT else self.op("Cast", x, to=dtype)

    def weight(self, name: str) -> ir.Value:
        return self._initializer(self.store.plain(name))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = str(tensor.name)
        if name not in self._initializers:
            self._initializers[name] = ir.val(name, const_value=tensor)
        return self._initializers[name]

    def range(self, end: ir.Value) -> ir.Value:
        return self.op("Range", self.constant(0), end, self.constant(1))

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """The extent of ``value`` along ``axis``, a scalar."""
        return self.op("Squeeze", self.op("Shape", value, start=axis, end=axis + 1))

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", value, self.constant(list(axes)))

    def linear(self, x: ir.Value, name: str, *, plain: bool = False) -> ir.Value:
        """``x`` (m, k) times the transposed matrix ``name`` (n, k), plus its bias where it has one.

        ``plain`` keeps float32 whatever the scheme, for matrices of a few rows.
        """
        bias = self.weight(name + ".bias") if name + ".bias" in self.store.weights else None
        name += ".weight"
        if plain or self.store.scheme in ("none", "float16"):
            if not plain:
                self._observe(x, name)
            x = self.op("MatMul", x, self._initializer(self.store.plain(name, transposed=True)))
            return x if bias is None else self.op("Add", x, bias)
        if self.store.scheme == "blockwise":
            return self._linear_in_blocks(x, self.store.blocks(name), bias)
        codes = self._initializer(self.store.rows(name, transposed=True).codes)
        return self._linear_in_integers(x, name, codes, bias)

    def linear_tied(self, x: ir.Value, table: str, bias_name: str) -> ir.Value:
        """``x`` (m, d) times the transposed embedding ``table`` (n, d), read from the bytes that ``lookup`` reads.

        Plus the bias of that name, where there is one.
        """
        bias = self.weight(bias_name) if bias_name in self.store.weights else None
        if self.store.scheme in ("none", "float16"):
            self._observe(x, table)
            return self.op("Gemm", x, self.weight(table), bias, transB=1)
        if self.store.scheme == "blockwise":
            return self._linear_in_blocks(x, self.store.table(table), bias)
        # ONNX Runtime transposes it once, as it loads the graph.
        codes = self.op("Transpose", self._initializer(self.store.rows(table).codes))
        return self._linear_in_integers(x, table, codes, bias)

    def _linear_in_blocks(self, x: ir.Value, matrix: "_Blocks", bias: ir.Value | None) -> ir.Value:
        n, blocks = matrix.scales.shape.numpy()
        # Level 4: activations in 8 bits with a scale per row and block, so that rows of a batch stay independent.
        return self.op(
            "MatMulNBits",
            x,
            self._initializer(matrix.codes),
            self._initializer(matrix.scales),
            None,
            None,
            bias,
            domain="com.microsoft",
            N=n,
            K=blocks * matrix.block_size,
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=4,
        )

    def _linear_in_integers(self, x: ir.Value, name: str, codes: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Integer products of the quantised rows of ``x`` (m, k) and ``codes`` (k, n) of the matrix ``name``."""
        scales, zero_point = self._initializer(self.store.rows(name).scales), self.constant(128, np.uint8)

        def product(rows: ir.Value, scale: ir.Value, bias: ir.Value | None) -> ir.Value:
            inputs = (rows, codes, scale, scales, zero_point, None, bias)
            return self.op("MatMulIntegerToFloat", *inputs, domain="com.microsoft")

        if name in self.store.peaks:
            peak = self.store.peaks[name]
            scale = self.constant(peak / 127, np.float32)
            if (x, peak) not in self._fixed:
                self._fixed[x, peak] = self.op("QuantizeLinear", x, scale, zero_point)
            return product(self._fixed[x, peak], scale, bias)
        rows, row_scales = self._quantised_rows(x)
        x = self.op("Mul", product(rows, self.constant(1, np.float32), None), row_scales)
        return x if bias is None else self.op("Add", x, bias)

    def _observe(self, x: ir.Value, name: str) -> None:
        if self.store.observed:
            self.output(self._peaks(x), f"peaks.{name}", None)

    def _peaks(self, x: ir.Value) -> ir.Value:
        """(m, k) -> (m,), the largest absolute value of each row."""
        return self.op(
            "ReduceMax", x if x in self._not_negative else self.op("Abs", x), self.constant([1]), keepdims=0
        )

    def begin_rows(self, x: ir.Value) -> None:
        """From here on, what matrices are multiplied with has as many rows as ``x`` (m, ...)."""
        if self.store.by_rows:
            rows = self.op("Shape", x, start=0, end=1)
            self._zero_points = self.op("Expand", self.constant([128], np.uint8), rows)

    def _quantised_rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """``x`` (m, k) in unsigned 8 bits around 128, as integer products are fast with, and the rows' scales (m, 1).

        One scale per row and not per tensor: rows of a batch stay independent.
        """
        if x not in self._quantised:
            peaks = self._peaks(x)
            scales = self.op("Mul", peaks, self.constant(1 / 127, np.float32))
            codes = self.op("QuantizeLinear", x, scales, self._zero_points, axis=0)
            self._quantised[x] = codes, self.unsqueeze(scales, 1)
        return self._quantised[x]

    def lookup(self, table: str, ids: ir.Value) -> ir.Value:
        """Rows ``ids`` (m,) of the embedding ``table`` (n, d)."""
        if self.store.scheme in ("none", "float16"):
            return self.op("Gather", self.weight(table), ids)
        if self.store.by_rows and self.store.table_bits == 8:
            rows = self.store.rows(table)
            codes, scales = (self.op("Gather", self._initializer(part), ids) for part in (rows.codes, rows.scales))
            return self.op("DequantizeLinear", codes, scales, axis=0)
        matrix = self.store.table(table)
        return self.op(
            "GatherBlockQuantized",
            self._initializer(matrix.flat_codes),
            ids,
            self._initializer(matrix.scales),
            domain="com.microsoft",
            bits=matrix.bits,
            block_size=matrix.block_size,
            gather_axis=0,
            quantize_axis=1,
        )


class _Network(_Graph):
    """The parts of a Transformer as nodes, in the order of ``models/transformer.py``.

    Hidden states are (m, d): rows side by side, which only attention tells apart.
    """

    def __init__(self, config: TransformerConfig, store: _Store) -> None:
        super().__init__(store)
        self.config, self.pre_norm = config, config.style in ("modern", "llama")

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Over the last axis of ``x``."""
        if self.pre_norm:
            return self.op("RMSNormalization", x, self.weight(name + ".weight"), epsilon=self.config.norm_eps)
        scale, bias = self.weight(name + ".weight"), self.weight(name + ".bias")
        return self.op("LayerNormalization", x, scale, bias, epsilon=self.config.norm_eps)

    def embed(self, ids: ir.Value, positions: ir.Value, token_types: ir.Value | None) -> ir.Value:
        """(m,) -> (m, d); ``positions`` and ``token_types`` are (m,)."""
        x, style = self.lookup("embed.token.weight", ids), self.config.style
        if style in ("modern", "marian"):
            x = self.op("Mul", x, self.number(self.config.d_model**0.5))
        if not self.config.rotates:
            x = self.op("Add", x, self.lookup("embed.position.weight", positions))
        if token_types is not None:
            x = self.op("Add", x, self.op("Gather", self.weight("embed.token_type.weight"), token_types))
        return self.norm(x, "embed.norm") if style == "bert" else x

    def layer(self, x: ir.Value, name: str, branches: "Mapping[str, _Branch]") -> ir.Value:
        """(m, d) -> (m, d) through ``branches``, each with its norm and residual."""
        for part, branch in branches.items():
            norm = f"{name}.{part}_norm"
            if self.pre_norm:
                x = self.op("Add", x, branch(self.norm(x, norm), f"{name}.{part}"))
            else:
                x = self.norm(self.op("Add", x, branch(x, f"{name}.{part}")), norm)
        return x

    def feed_forward(self, x: ir.Value, name: str) -> ir.Value:
        """(m, d) -> (m, d)."""
        x = self.linear(x, name + ".up")
        match self.config.style, self.config.activation:
            case "modern", _:
                x = self.op("Relu", x)
                x = self.op("Mul", x, x)
                self._not_negative.add(x)
            case "llama", _:
                gate, x = self.ops("Split", x, n_outputs=2, axis=-1, num_outputs=2)
                x = self.op("Mul", self.silu(gate), x)
            case _, "relu":
                x = self.op("Relu", x)
                self._not_negative.add(x)
            case _, "silu":
                x = self.silu(x)
            case _:
                x = self.op("Gelu", x)
        return self.linear(x, name + ".down")

    def silu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(x)``, also called swish."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def head_norm(self, x: ir.Value, n_heads: int, norm: str) -> ir.Value:
        """Normalise each head of queries or keys (m, n_heads * e): the modern style only."""
        if self.config.style != "modern":
            return x
        split = self.op("Reshape", x, self.constant([0, n_heads, self.config.head_dim]))
        return self.op("Reshape", self.norm(split, norm), self.constant([0, n_heads * self.config.head_dim]))

    def queries_keys_values(
        self, x: ir.Value, name: str, shape: ir.Value, rotary: tuple[ir.Value, ir.Value, ir.Value] | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Of self-attention, (m, d) -> (b, s, d), (b, s, g * e), (b, s, g * e); ``shape`` is [b, s, -1]."""
        config = self.config
        widths = self.constant([config.d_model, config.kv_width, config.kv_width])
        q, k, v = self.ops("Split", self.linear(x, name + ".qkv"), widths, n_outputs=3, axis=-1)
        q, k = (
            self.head_norm(q, config.n_heads, name + ".q_norm"),
            self.head_norm(k, config.kv_heads, name + ".k_norm"),
        )
        q, k, v = (self.op("Reshape", part, shape) for part in (q, k, v))
        if rotary:
            q = self.op("RotaryEmbedding", q, *rotary, num_heads=config.n_heads)
            k = self.op("RotaryEmbedding", k, *rotary, num_heads=config.kv_heads)
        return q, k, v

    def split_heads(self, x: ir.Value) -> ir.Value:
        """(b, s, d) -> (b, h, s, e)."""
        split = self.op("Reshape", x, self.constant([0, 0, self.config.n_heads, self.config.head_dim]))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def rotary(self) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines (p, e / 2), which ONNX Runtime folds into constants as it loads the graph.

        A little longer than any text, for its padding.
        """
        half = self.config.head_dim // 2
        frequencies = self.config.rope_base ** (-np.arange(half) / half)
        every = self.op(
            "Cast", self.range(self.constant(self.config.max_positions + KEY_BLOCK)), to=ir.DataType.DOUBLE
        )
        angle = self.op("Mul", self.unsqueeze(every, 1), self.constant(frequencies.tolist(), np.float64))
        cos, sin = (self.op("Cast", self.op(op, angle), to=self.store.float_type) for op in ("Cos", "Sin"))
        return cos, sin


_Branch = Callable[[ir.Value, str], ir.Value]


class _Encoder(_Network):
    """Whole sequences, every token seeing all of its row.

    Rows of one width have padding, on which nothing but attention is computed: hidden states are those of the n real
    tokens, and ``padded`` and ``real`` lead from one to the other.
    """

    def __init__(self, config: TransformerConfig, store: _Store) -> None:
        super().__init__(config, store)
        self.ids, self.lengths = self.input("input_ids", "rows", "tokens"), self.input("lengths", "rows")
        self.token_types = self.input("token_types", "rows", "tokens") if config.n_token_types else None
        is_real = self.op("Less", self.range(self.size(self.ids, 1)), self.unsqueeze(self.lengths, 1))
        self.is_real = self.op("Cast", is_real, to=ir.DataType.FLOAT)  # (b, s)
        flat = self.flat(is_real)
        self._real_at = self.op("Squeeze", self.op("NonZero", flat), self.constant([0]))
        # Padding reads the real token before it, and nobody reads the padding.
        count = self.op("CumSum", self.op("Cast", flat, to=ir.DataType.INT64), self.constant(0))
        self._padded_at = self.op("Sub", count, self.constant(1))
        shape = self.op("Shape", self.ids)
        self._rows_shape = self.op("Concat", shape, self.constant([-1]), axis=0)
        self._layers: list[ir.Value] = []
        """What each layer puts out, (n, d)."""

    def flat(self, x: ir.Value) -> ir.Value:
        """(b, s) -> (b * s,)."""
        return self.op("Reshape", x, self.constant([-1]))

    def real(self, x: ir.Value) -> ir.Value:
        """(b * s, ...) -> (n, ...)."""
        return self.op("Gather", x, self._real_at)

    def padded(self, x: ir.Value) -> ir.Value:
        """(n, k) -> (b, s, k)."""
        return self.op("Reshape", self.op("Gather", x, self._padded_at), self._rows_shape)

    def encode(self) -> ir.Value:
        """(b, s) -> (n, d)."""
        config = self.config
        positions = self.op("Expand", self.range(self.size(self.ids, 1)), self.op("Shape", self.ids))
        positions = self.real(self.flat(positions))
        rotary = (*self.rotary(), self.unsqueeze(positions, 1)) if config.rotates else None

        def attend(x: ir.Value, name: str) -> ir.Value:
            if rotary is None:
                x = self.padded(self.linear(x, name + ".qkv"))
                parts = self.ops("Split", x, n_outputs=3, axis=-1, num_outputs=3)
            else:
                flat = self.constant([-1, config.d_model])
                # To be rotated, each token is a row: a row of all would be longer than any that the model knows.
                alone = self.constant([-1, 1, config.d_model])
                every = self.queries_keys_values(x, name, alone, rotary)
                parts = [self.padded(self.op("Reshape", part, flat)) for part in every]
            n_heads = config.n_heads
            x = self.op("Attention", *parts, None, None, None, self.lengths, q_num_heads=n_heads, kv_num_heads=n_heads)
            x = self.real(self.op("Reshape", x, self.constant([-1, config.d_model])))
            return self.linear(x, name + ".out")

        types = None if self.token_types is None else self.real(self.flat(self.token_types))
        x = self.embed(self.real(self.flat(self.ids)), positions, types)
        self.begin_rows(x)
        for i in range(config.n_encoder_layers):
            x = self.layer(x, f"encoder.{i}", {"attn": attend, "ffn": self.feed_forward})
            self._layers.append(x)
        return self.norm(x, "encoder_norm") if self.pre_norm else x

    def pool(self, x: ir.Value) -> ir.Value:
        """(n, d) -> (b, d), what stands for each whole text."""
        if self.config.pooling == "mean":
            return self.mean(x)
        first = self.op("Gather", self.padded(x), self.constant(0), axis=1)
        if self.config.pooling == "first":
            return first
        self.begin_rows(first)
        op = "Tanh" if self.config.pooling == "first-tanh" else "Relu"
        return self.op(op, self.linear(first, "head.dense"))

    def vector(self) -> ir.Value:
        """The means of the ``vector_layers``, (b, l * d)."""
        means = [self.mean(self._layers[number - 1]) for number in self.config.vector_layers]
        return self.op("Concat", *means, axis=1)

    def mean(self, x: ir.Value) -> ir.Value:
        """(n, d) -> (b, d), over the real tokens of each row."""
        x = self.padded(x)
        # A product with the mask adds in the order of the tokens; ReduceSum's order depends on how many there are.
        # In single precision: half of it would lose the last of many tokens.
        x = self.cast(x, ir.DataType.FLOAT)
        total = self.op("Squeeze", self.op("MatMul", self.unsqueeze(self.is_real, 1), x), self.constant([1]))
        mean = self.op("Div", total, self.unsqueeze(self.op("Cast", self.lengths, to=ir.DataType.FLOAT), 1))
        return self.cast(mean, self.store.float_type)


def _encoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Encoder(config, store)
    x = g.encode()
    if config.vector_layers:
        g.output(g.cast(g.vector(), _FLOAT), "vector", "rows", len(config.vector_layers) * config.d_model)
    if config.head == "span":
        g.output(g.cast(g.padded(g.linear(x, "head.out", plain=True)), _FLOAT), "logits", "rows", "tokens", 2)
        return g
    pooled = g.pool(x)
    if config.head == "embed":
        g.output(g.cast(pooled, _FLOAT), "logits", "rows", config.d_model)
    else:
        g.output(g.cast(g.linear(pooled, "head.out", plain=True), _FLOAT), "logits", "rows", config.n_labels)
    return g


def _source_encoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Encoder(config, store)
    memory = g.encode()
    for i in range(config.n_decoder_layers):
        name = f"decoder.{i}.cross"
        k, v = g.ops("Split", g.linear(memory, name + ".kv"), n_outputs=2, axis=-1, num_outputs=2)
        for part, x in (("k", g.head_norm(k, config.n_heads, name + ".k_norm")), ("v", v)):
            shape = ("rows", config.n_heads, "tokens", config.head_dim)
            g.output(g.split_heads(g.padded(x)), f"cross_{part}_{i}", *shape, dtype=store.float_type)
    return g


def _decoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Network(config, store)
    ids = g.input("input_ids", "rows", "tokens")
    starts, lengths = g.input("positions", "rows"), g.input("lengths", "rows")
    n_tokens = g.size(ids, 1)
    text = g.op("Add", g.unsqueeze(starts, 1), g.range(n_tokens))  # (b, s), the place of each token
    chunk = g.op("Concat", g.op("Shape", ids), g.constant([-1]), axis=0)
    flat, heads = g.constant([-1]), {"num_heads": config.n_heads}
    # Padding may lie beyond the last position that the model knows.
    positions = g.op("Min", text, g.constant(config.max_positions - 1))

    def buffers(kind: str, layer: int | str, rows: str, capacity: str) -> list[ir.Value]:
        shape = (rows, config.kv_heads, capacity, config.head_dim)
        return [g.input(f"{kind}{part}_{layer}", *shape, dtype=store.float_type) for part in ("k", "v")]

    before = [buffers("", i, "rows", "capacity") for i in range(config.n_decoder_layers)]
    attend_to: Callable[[ir.Value, str, list[ir.Value]], list[ir.Value]]
    token_types = None
    if config.architecture == "prefix-lm":
        # How many keys of its row a query sees, (b, s): itself and all before it, and all of the prefix.
        prefix = g.unsqueeze(g.input("prefix_lengths", "rows"), 1)
        visible = g.op("Max", g.op("Add", text, g.constant(1)), prefix)
        if config.n_token_types:
            token_types = g.op("Reshape", g.op("GreaterOrEqual", text, prefix), flat)
            token_types = g.op("Cast", token_types, to=ir.DataType.INT64)
        mask = g.unsqueeze(g.op("Less", g.range(g.size(before[0][0], 2)), g.unsqueeze(visible, 2)), 1)
        rotary = (*g.rotary(), positions) if config.rotates else None

        def attend_to(x: ir.Value, name: str, before: list[ir.Value]) -> list[ir.Value]:
            q, k, v = g.queries_keys_values(x, name, chunk, rotary)
            updated = [
                g.op("TensorScatter", buffer, g.split_heads(part), starts, axis=2)
                for buffer, part in zip(before, (k, v), strict=True)
            ]
            out = g.op("Transpose", g.op("Attention", g.split_heads(q), *updated, mask), perm=[0, 2, 1, 3])
            return [g.op("Reshape", out, chunk), *updated]
    else:
        last = g.op("Sub", g.op("Add", starts, lengths), g.constant(1))
        last = g.op("Cast", last, to=ir.DataType.INT32)
        # Of the first chunk of a prompt this is its width, padding included: that is how the operator knows it.
        if store.scheme == "float16":
            total = g.input("total", dtype=ir.DataType.INT32)
        else:
            total = g.op("Add", g.op("ReduceMax", starts, keepdims=0), n_tokens)
            total = g.op("Cast", total, to=ir.DataType.INT32)
        rotations = g.rotary() if config.rotates else ()
        how = {**heads, "kv_num_heads": config.kv_heads, "do_rotary": int(config.rotates)}

        def attend_to(x: ir.Value, name: str, before: list[ir.Value]) -> list[ir.Value]:
            if config.style == "modern":
                parts: tuple[ir.Value | None, ...] = g.queries_keys_values(x, name, chunk, None)
            else:
                parts = g.op("Reshape", g.linear(x, name + ".qkv"), chunk), None, None
            inputs = (*parts, *before, last, total, *rotations)
            return g.ops("GroupQueryAttention", *inputs, n_outputs=3, domain="com.microsoft", **how)

    def attend(x: ir.Value, name: str) -> ir.Value:
        layer = int(name.split(".")[1])
        x, *updated = attend_to(x, name, before[layer])
        for part, buffer in zip(("k", "v"), updated, strict=True):
            shape = ("rows", config.kv_heads, "capacity", config.head_dim)
            g.output(buffer, f"new_{part}_{layer}", *shape, dtype=store.float_type)
        return g.linear(g.op("Reshape", x, g.constant([-1, config.d_model])), name + ".out")

    branches: dict[str, _Branch] = {"attn": attend, "ffn": g.feed_forward}
    if config.architecture == "encoder-decoder":
        source_lengths = g.input("source_lengths", "sources")
        n_keys = g.op("Cast", source_lengths, to=ir.DataType.INT32)
        # The rows of one source are so many queries of one row, so that its keys are read once.
        by_source = g.op("Concat", g.op("Shape", source_lengths), g.constant([-1, config.d_model]), axis=0)

        def attend_to_source(x: ir.Value, name: str) -> ir.Value:
            k, v = buffers("cross_", name.split(".")[1], "sources", "source")
            q = g.op("Reshape", g.head_norm(g.linear(x, name + ".q"), config.n_heads, name + ".q_norm"), by_source)
            x = g.op("MultiHeadAttention", q, k, v, None, n_keys, domain="com.microsoft", **heads)
            return g.linear(g.op("Reshape", x, g.constant([-1, config.d_model])), name + ".out")

        branches = {"attn": attend, "cross": attend_to_source, "ffn": g.feed_forward}

    x = g.embed(g.op("Reshape", ids, flat), g.op("Reshape", positions, flat), token_types)
    g.begin_rows(x)
    for i in range(config.n_decoder_layers):
        x = g.layer(x, f"decoder.{i}", branches)
    if config.extract_head:
        hidden = g.norm(x, "decoder_norm") if g.pre_norm else x
        scores = g.op("Reshape", g.linear(hidden, "head.extract", plain=True), g.op("Shape", ids))
        g.output(g.cast(scores, _FLOAT), "extract_logits", "rows", "tokens")
    # The last real token is picked before the output layer, the widest of all.
    # Where rows start is a range of sizes alone, which are the host's: a product with one would have to be copied.
    row_starts = g.op("Range", g.constant(0), g.size(x, 0), n_tokens)
    x = g.op("Gather", x, g.op("Sub", g.op("Add", row_starts, lengths), g.constant(1)))
    g.begin_rows(x)
    if g.pre_norm:
        x = g.norm(x, "decoder_norm")
    elif config.style == "bert":
        x = g.norm(g.op("Gelu", g.linear(x, "head.dense")), "head.norm")
    own_output = "head.out.weight" in store.weights
    x = g.linear(x, "head.out") if own_output else g.linear_tied(x, "embed.token.weight", "head.out.bias")
    x = g.cast(x, _FLOAT)
    g.output(x, "logits", "rows", config.vocab_size)
    if store.scheme == "float16":
        g.output(g.op("ArgMax", x, axis=1, keepdims=0), "tokens", "rows", dtype=ir.DataType.INT64)
    return g


def _beams(config: TransformerConfig, store: _Store) -> _Graph:
    g = _Graph(store)
    logits = g.input("logits", "rows", config.vocab_size, dtype=ir.DataType.FLOAT)
    count = g.input("count", 1)
    every = g.op("LogSoftmax", logits)
    size = _stretch(config.vocab_size)
    # The best words lie in the stretches of the vocabulary with the best peaks: only those are searched.
    stretches = g.op("Reshape", every, g.constant([0, -1, size]))
    peaks = g.op("ReduceMax", stretches, g.constant([2]), keepdims=0)
    n_best = g.op("Min", count, g.constant([config.vocab_size // size]))
    _, best = g.ops("TopK", peaks, n_best, n_outputs=2)
    found = g.op("GatherND", stretches, g.unsqueeze(best, 2), batch_dims=1)
    scores, places = g.ops("TopK", g.op("Reshape", found, g.constant([0, -1])), count, n_outputs=2)
    starts = g.op("Mul", g.op("GatherElements", best, g.op("Div", places, g.constant(size)), axis=1), g.constant(size))
    words = g.op("Add", starts, g.op("Mod", places, g.constant(size)))
    g.output(scores, "log_probabilities", "rows", "count")
    g.output(words, "words", "rows", "count", dtype=ir.DataType.INT64)
    return g


def _stretch(vocab_size: int) -> int:
    """Words of a stretch: the divisor that is nearest to 64."""
    return min((size for size in range(1, 257) if vocab_size % size == 0), key=lambda size: abs(size - 64))
