"""The ONNX graphs of a Transformer, built straight from its weights: one helper per op, one loop per layer.

Knows nothing of PyTorch or training: float32 arrays, named as in ``models.transformer.Transformer.state_dict()``, go
in; files come out. ``models/transformer.py`` is the reference that these graphs repeat; for the llama and marian
styles and the heads of imported encoders it is the transformers library (``training/families.py``). A module has a
bias where there is an array of that name, and an output layer of its own where there is a ``head.out``. Shapes in
comments: ``b`` rows, ``s`` tokens of a chunk, ``t`` keys, ``c`` capacity of a buffer, ``d`` model width, ``h`` heads,
``e`` head size, ``kv`` the width of all key heads together (``d`` where no query heads share one).

Inputs are int64 and padded on the right; outputs are float32.

- ``model.onnx`` (encoder): ``input_ids`` (b, s), ``lengths`` (b,), with the bert style ``token_types`` (b, s)
  -> ``logits``: (b, labels), or (b, s, 2) of a span head, or (b, d) of an embed head.
- ``encoder.onnx`` (encoder-decoder): ``input_ids``, ``lengths`` -> ``cross_k_{i}``, ``cross_v_{i}`` (b, s, d), the
  keys and values that layer i of the decoder attends to.
- ``decoder.onnx``: ``input_ids`` (b, s); ``positions`` (b,), where in its text each row's chunk starts; ``lengths``
  (b,), real tokens of the chunk; ``k_{i}``, ``v_{i}`` (b, c, kv), what was read before, with ``c`` no less than any
  start plus s; a prefix LM adds ``prefix_lengths`` (b,), which its first chunk must hold; an encoder-decoder adds
  ``cross_k_{i}``, ``cross_v_{i}`` (b, c', d) and ``source_lengths`` (b,). -> ``logits`` (b, words) at the last real
  token, with an extract head ``extract_logits`` (b, s), and ``new_k_{i}``, ``new_v_{i}`` (b, c, kv): bind them to the
  memory of ``k_{i}``, ``v_{i}``, which are then updated in place. One graph thus serves a prompt, a part of a prompt
  and a single token; its cost follows what is read, not ``c``.

All graphs of a folder share ``weights.bin``, in which every array lies once. With ``blockwise`` weights a row of a
matrix is cut into blocks of ``block_size`` with one float32 scale each; token and position embeddings always have
8 bits.

A row gives the same bits alone as in any batch, measured on a CPU with AVX-512, as long as blocks have 64 numbers or
fewer (of 128, MatMulNBits sums a single row in another order), buffers hold a multiple of ``KEY_BLOCK``, and texts are
padded to a multiple of four tokens unless all have one (products of a single row sum in fours, then one by one).
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
_EMBEDDING_BLOCK = 64
_ALIGNMENT = 64

KEY_BLOCK = 16
"""Attention cuts its keys to a multiple of this size, so that one query sums over them in whole groups of four."""

Scheme = Literal["none", "blockwise"]


def write_graphs(
    folder: Path,
    config: TransformerConfig,
    weights: Mapping[str, NDArray[np.float32]],
    scheme: Scheme = "none",
    bits: Literal[4, 8] = 8,
    block_size: int = 64,
) -> list[Path]:
    """Write the graphs of a model and the weights that they share into ``folder``; returns the files written.

    ``bits`` and ``block_size`` (a power of two from 16; halved for a matrix whose rows it does not divide) say how
    ``blockwise`` stores the matrices. Raises ``ValueError`` where a row is no multiple of 16 and ``KeyError`` where a
    weight is missing.
    """
    path = folder / WEIGHTS_NAME
    with _Store(path, weights, scheme, bits, block_size) as store:
        if config.architecture == "encoder":
            graphs = {"model.onnx": _encoder(config, store)}
        elif config.architecture == "encoder-decoder":
            graphs = {"encoder.onnx": _source_encoder(config, store), "decoder.onnx": _decoder(config, store)}
        else:
            graphs = {"decoder.onnx": _decoder(config, store)}
    for name, graph in graphs.items():
        ir.save(graph.model(), folder / name)
    return [*(folder / name for name in graphs), path]


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


def _fitting_block_size(width: int, block_size: int) -> int:
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


class _Store:
    """The weights, and the file in which every array lies once, whichever graphs and shapes refer to it."""

    def __init__(
        self, path: Path, weights: Mapping[str, NDArray[np.float32]], scheme: Scheme, bits: int, block_size: int
    ) -> None:
        self.weights, self.quantised = weights, scheme == "blockwise"
        self._bits, self._block_size = bits, block_size
        self._path, self._file = path, path.open("wb")
        self._offsets: dict[str, int] = {}
        self._blocks: dict[str, _Blocks] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def plain(self, name: str, *, transposed: bool = False) -> ir.ExternalTensor:
        """A weight as float32; ``transposed`` is another array, with a place of its own."""
        weight = self.weights[name]
        return self._tensor(name + ".T", weight.T) if transposed else self._tensor(name, weight)

    def blocks(self, name: str) -> _Blocks:
        """A matrix with the bits and block size of the model."""
        return self._quantised(name, self._bits, self._block_size)

    def table(self, name: str) -> _Blocks:
        """An embedding, which always has 8 bits."""
        return self._quantised(name, 8, _EMBEDDING_BLOCK)

    def _quantised(self, name: str, bits: int, block_size: int) -> _Blocks:
        if name not in self._blocks:
            weight = self.weights[name]
            block_size = _fitting_block_size(weight.shape[1], block_size)
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
        self, key: str, array: NDArray[np.float32] | NDArray[np.uint8], alias: str | None = None
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

    def output(self, value: ir.Value, name: str, *shape: str | int) -> None:
        value.name = name
        self._outputs.append(self.known(value, *shape))

    def known(self, value: ir.Value, *shape: str | int) -> ir.Value:
        """Say the shape of a float32 ``value`` where shape inference does not find it."""
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        return value

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
        """``x`` (..., k) times the transposed matrix ``name`` (n, k), plus its bias where it has one.

        ``plain`` keeps float32 whatever the scheme, for matrices of a few rows.
        """
        bias = self.weight(name + ".bias") if name + ".bias" in self.store.weights else None
        if self.store.quantised and not plain:
            return self._linear_in_blocks(x, self.store.blocks(name + ".weight"), bias)
        x = self.op("MatMul", x, self._initializer(self.store.plain(name + ".weight", transposed=True)))
        return x if bias is None else self.op("Add", x, bias)

    def linear_tied(self, x: ir.Value, table: str) -> ir.Value:
        """``x`` (b, d) times the transposed embedding ``table`` (n, d), read from the bytes that ``lookup`` reads."""
        if self.store.quantised:
            return self._linear_in_blocks(x, self.store.table(table), None)
        return self.op("Gemm", x, self.weight(table), transB=1)

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

    def lookup(self, table: str, ids: ir.Value) -> ir.Value:
        """Rows ``ids`` of the embedding ``table`` (n, d)."""
        if not self.store.quantised:
            return self.op("Gather", self.weight(table), ids)
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
    """The parts of a Transformer as nodes, in the order of ``models/transformer.py``."""

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
        """(b, s) -> (b, s, d); ``positions`` is (b, s)."""
        x, style = self.lookup("embed.token.weight", ids), self.config.style
        if style in ("modern", "marian"):
            x = self.op("Mul", x, self.constant(self.config.d_model**0.5, np.float32))
        if not self.config.rotates:
            x = self.op("Add", x, self.lookup("embed.position.weight", positions))
        if token_types is not None:
            x = self.op("Add", x, self.op("Gather", self.weight("embed.token_type.weight"), token_types))
        return self.norm(x, "embed.norm") if style == "bert" else x

    def layer(self, x: ir.Value, name: str, branches: "Mapping[str, _Branch]") -> ir.Value:
        """(b, s, d) -> (b, s, d) through ``branches``, each with its norm and residual."""
        for part, branch in branches.items():
            norm = f"{name}.{part}_norm"
            if self.pre_norm:
                x = self.op("Add", x, branch(self.norm(x, norm), f"{name}.{part}"))
            else:
                x = self.norm(self.op("Add", x, branch(x, f"{name}.{part}")), norm)
        return x

    def feed_forward(self, x: ir.Value, name: str) -> ir.Value:
        """(b, s, d) -> (b, s, d)."""
        x = self.linear(x, name + ".up")
        match self.config.style, self.config.activation:
            case "modern", _:
                x = self.op("Relu", x)
                x = self.op("Mul", x, x)
            case "llama", _:
                gate, x = self.ops("Split", x, n_outputs=2, axis=-1, num_outputs=2)
                x = self.op("Mul", self.silu(gate), x)
            case _, "relu":
                x = self.op("Relu", x)
            case _, "silu":
                x = self.silu(x)
            case _:
                x = self.op("Gelu", x)
        return self.linear(x, name + ".down")

    def silu(self, x: ir.Value) -> ir.Value:
        """``x * sigmoid(x)``, also called swish."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def heads(
        self, x: ir.Value, n_heads: int, norm: str, rotary: tuple[ir.Value, ir.Value, ir.Value] | None = None
    ) -> ir.Value:
        """Normalise each head of queries or keys (b, s, n_heads * e) in the modern style, then rotate it by its
        position where ``rotary`` says how."""
        if self.config.style == "modern":
            split = self.op("Reshape", x, self.constant([0, 0, n_heads, self.config.head_dim]))
            x = self.op("Reshape", self.norm(split, norm), self.constant([0, 0, n_heads * self.config.head_dim]))
        return x if rotary is None else self.op("RotaryEmbedding", x, *rotary, num_heads=n_heads)

    def queries_keys_values(
        self, x: ir.Value, name: str, rotary: tuple[ir.Value, ir.Value, ir.Value] | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Of self-attention, (b, s, d), (b, s, kv), (b, s, kv)."""
        config = self.config
        widths = self.constant([config.d_model, config.kv_width, config.kv_width])
        q, k, v = self.ops("Split", self.linear(x, name + ".qkv"), widths, n_outputs=3, axis=-1)
        q = self.heads(q, config.n_heads, name + ".q_norm", rotary)
        return q, self.heads(k, config.kv_heads, name + ".k_norm", rotary), v

    def attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None, lengths: ir.Value | None = None
    ) -> ir.Value:
        """(b, s, d), (b, t, kv), (b, t, kv) -> (b, s, d); ``mask`` (b, 1, s, t), True where a query sees a key, or the
        keys' ``lengths`` (b,)."""
        n_heads, kv_heads = self.config.n_heads, self.config.kv_heads
        return self.op("Attention", q, k, v, mask, None, None, lengths, q_num_heads=n_heads, kv_num_heads=kv_heads)

    def rotary(self, positions: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """Cosines and sines (max_positions, e / 2), which ONNX Runtime folds into constants as it loads the graph, and
        ``positions`` (b, s); None for a style that does not rotate."""
        if not self.config.rotates:
            return None
        half = self.config.head_dim // 2
        frequencies = self.config.rope_base ** (-np.arange(half) / half)
        every = self.op("Cast", self.range(self.constant(self.config.max_positions)), to=ir.DataType.DOUBLE)
        angle = self.op("Mul", self.unsqueeze(every, 1), self.constant(frequencies.tolist(), np.float64))
        cos, sin = (self.op("Cast", self.op(op, angle), to=ir.DataType.FLOAT) for op in ("Cos", "Sin"))
        return cos, sin, positions

    def in_key_blocks(self, n_keys: ir.Value) -> ir.Value:
        """``n_keys`` rounded up to a multiple of ``KEY_BLOCK``."""
        block = self.constant(KEY_BLOCK)
        return self.op("Mul", self.op("Div", self.op("Add", n_keys, self.constant(KEY_BLOCK - 1)), block), block)

    def encode(self, ids: ir.Value, lengths: ir.Value, token_types: ir.Value | None) -> ir.Value:
        """(b, s) -> (b, s, d), every token seeing all of its row."""
        positions = self.op("Expand", self.range(self.size(ids, 1)), self.op("Shape", ids))
        rotary = self.rotary(positions)

        def attend(x: ir.Value, name: str) -> ir.Value:
            q, k, v = self.queries_keys_values(x, name, rotary)
            return self.linear(self.attention(q, k, v, lengths=lengths), name + ".out")

        x = self.embed(ids, positions, token_types)
        for i in range(self.config.n_encoder_layers):
            x = self.layer(x, f"encoder.{i}", {"attn": attend, "ffn": self.feed_forward})
        return self.norm(x, "encoder_norm") if self.pre_norm else x

    def pool(self, x: ir.Value, lengths: ir.Value) -> ir.Value:
        """(b, s, d) -> (b, d), what stands for each whole text."""
        if self.config.pooling != "mean":
            first = self.op("Gather", x, self.constant(0), axis=1)
            if self.config.pooling == "first":
                return first
            op = "Tanh" if self.config.pooling == "first-tanh" else "Relu"
            return self.op(op, self.linear(first, "head.dense"))
        real = self.op("Less", self.range(self.size(x, 1)), self.unsqueeze(lengths, 1))
        # A product with the mask adds in the order of the tokens; ReduceSum's order depends on how many there are.
        total = self.op("MatMul", self.unsqueeze(self.op("Cast", real, to=ir.DataType.FLOAT), 1), x)
        total = self.op("Squeeze", total, self.constant([1]))
        return self.op("Div", total, self.unsqueeze(self.op("Cast", lengths, to=ir.DataType.FLOAT), 1))


_Branch = Callable[[ir.Value, str], ir.Value]


def _encoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Network(config, store)
    ids, lengths = g.input("input_ids", "rows", "tokens"), g.input("lengths", "rows")
    token_types = g.input("token_types", "rows", "tokens") if config.n_token_types else None
    x = g.encode(ids, lengths, token_types)
    if config.head == "span":
        g.output(g.linear(x, "head.out", plain=True), "logits", "rows", "tokens", 2)
        return g
    pooled = g.pool(x, lengths)
    if config.head == "embed":
        g.output(pooled, "logits", "rows", config.d_model)
    else:
        g.output(g.linear(pooled, "head.out", plain=True), "logits", "rows", config.n_labels)
    return g


def _source_encoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Network(config, store)
    memory = g.encode(g.input("input_ids", "rows", "tokens"), g.input("lengths", "rows"), None)
    for i in range(config.n_decoder_layers):
        name = f"decoder.{i}.cross"
        k, v = g.ops("Split", g.linear(memory, name + ".kv"), n_outputs=2, axis=-1, num_outputs=2)
        g.output(g.heads(k, config.kv_heads, name + ".k_norm"), f"cross_k_{i}", "rows", "tokens", config.d_model)
        g.output(v, f"cross_v_{i}", "rows", "tokens", config.d_model)
    return g


def _decoder(config: TransformerConfig, store: _Store) -> _Network:
    g = _Network(config, store)
    ids = g.input("input_ids", "rows", "tokens")
    starts, lengths = g.input("positions", "rows"), g.input("lengths", "rows")
    text = g.op("Add", g.unsqueeze(starts, 1), g.range(g.size(ids, 1)))  # (b, s), the place of each token
    # How many keys of its row a query sees, (b, s): itself and all before it, and all of the prefix.
    visible, token_types = g.op("Add", text, g.constant(1)), None
    if config.architecture == "prefix-lm":
        prefix = g.unsqueeze(g.input("prefix_lengths", "rows"), 1)
        visible = g.op("Max", visible, prefix)
        if config.n_token_types:
            token_types = g.op("Cast", g.op("GreaterOrEqual", text, prefix), to=ir.DataType.INT64)
    # Padding may lie beyond the last position that the model knows.
    positions = g.op("Min", text, g.constant(config.max_positions - 1))
    rotary = g.rotary(positions)

    def cut(buffer: ir.Value, size: ir.Value, extent: str) -> ir.Value:
        part = g.op("Slice", buffer, g.constant([0]), g.unsqueeze(size, 0), g.constant([1]))
        return g.known(part, "rows", extent, config.kv_width)  # Attention needs the width to infer its own

    def buffers(kind: str, layer: str, capacity: str) -> list[ir.Value]:
        shape = ("rows", capacity, config.kv_width)
        return [g.input(f"{kind}{part}_{layer}", *shape, dtype=ir.DataType.FLOAT) for part in ("k", "v")]

    before = [buffers("", str(i), "capacity") for i in range(config.n_decoder_layers)]
    # Attention over the whole of the buffers would cost their capacity: cut them to what any row sees.
    n_keys = g.in_key_blocks(g.op("ReduceMax", visible, keepdims=0))
    n_keys = g.op("Min", n_keys, g.size(before[0][0], 1))
    mask = g.unsqueeze(g.op("Less", g.range(n_keys), g.unsqueeze(visible, 2)), 1)

    def attend(x: ir.Value, name: str) -> ir.Value:
        q, *new = g.queries_keys_values(x, name, rotary)
        layer = name.split(".")[1]
        updated = [
            g.op("TensorScatter", buffer, chunk, starts, axis=1)
            for buffer, chunk in zip(before[int(layer)], new, strict=True)
        ]
        for part, buffer in zip(("k", "v"), updated, strict=True):
            g.output(buffer, f"new_{part}_{layer}", "rows", "capacity", config.kv_width)
        k, v = (cut(buffer, n_keys, "keys") for buffer in updated)
        return g.linear(g.attention(q, k, v, mask=mask), name + ".out")

    branches: dict[str, _Branch] = {"attn": attend, "ffn": g.feed_forward}
    if config.architecture == "encoder-decoder":
        source_lengths = g.input("source_lengths", "rows")
        n_source = g.in_key_blocks(g.op("ReduceMax", source_lengths, keepdims=0))

        def attend_to_source(x: ir.Value, name: str) -> ir.Value:
            q = g.heads(g.linear(x, name + ".q"), config.n_heads, name + ".q_norm")
            k, v = (cut(buffer, n_source, "source_keys") for buffer in buffers("cross_", name.split(".")[1], "source"))
            return g.linear(g.attention(q, k, v, lengths=source_lengths), name + ".out")

        branches = {"attn": attend, "cross": attend_to_source, "ffn": g.feed_forward}

    x = g.embed(ids, positions, token_types)
    for i in range(config.n_decoder_layers):
        x = g.layer(x, f"decoder.{i}", branches)
    if config.extract_head:
        hidden = g.norm(x, "decoder_norm") if g.pre_norm else x
        scores = g.op("Squeeze", g.linear(hidden, "head.extract", plain=True), g.constant([2]))
        g.output(scores, "extract_logits", "rows", "tokens")
    # The last real token is picked before the output layer, the widest of all.
    last = g.unsqueeze(g.op("Sub", lengths, g.constant(1)), 1)
    x = g.op("GatherND", x, last, batch_dims=1)
    if g.pre_norm:
        x = g.norm(x, "decoder_norm")
    elif config.style == "bert":
        x = g.norm(g.op("Gelu", g.linear(x, "head.dense")), "head.norm")
    own_output = "head.out.weight" in store.weights
    x = g.linear(x, "head.out") if own_output else g.linear_tied(x, "embed.token.weight")
    if "head.word_bias" in store.weights:
        x = g.op("Add", x, g.weight("head.word_bias"))
    g.output(x, "logits", "rows", config.vocab_size)
    return g
