"""Training that feels how weights will be stored: products as the quantised graphs compute them (``models.graph``).

Numbers are rounded to their codes on the way forward, and gradients pass as if they were not (straight-through, Bengio
et al. 2013). Knows nothing of tasks, and changes no weight.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.graph import TABLE_BLOCKS, fitting_block_size, most_code
from models.transformer import Transformer
from training.recipe import Storage

_PLAIN = ("head.out.weight", "head.extract.weight")
"""Matrices of a few rows, which every scheme leaves in float32."""
_TABLES = ("embed.token.weight", "embed.position.weight")
"""What is looked up; a decoder multiplies with the first too, as the output of words."""


def fake_rows(x: Tensor, bits: int = 8) -> Tensor:
    """``x`` as codes of ``bits``, with a scale for each row of the last axis, stand for it."""
    peak = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(peak == 0, 1.0, peak / most_code(bits))
    return _straight_through(x, (x / scale).round() * scale)


def fake_blocks(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """``weight`` ``(n, k)`` as its codes of the scheme ``blockwise`` stand for it (``models.graph.quantize``)."""
    zero = 1 << (bits - 1)
    blocks = weight.detach().reshape(len(weight), -1, block_size)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(peak == 0, 1.0, peak / -zero)
    codes = (blocks / scale).round().clamp(-zero, zero - 1)
    return _straight_through(weight, (codes * scale).flatten(-2))


def _straight_through(x: Tensor, stored: Tensor) -> Tensor:
    return x + (stored - x).detach()


class FakeQuantised(TorchFunctionMode):
    """While it is entered, ``model`` computes with its matrices, its tables, and what they are multiplied with as
    ``how`` stores them: activations with a scale for each token, or for each block of one."""

    def __init__(self, model: Transformer, how: Storage) -> None:
        super().__init__()
        weights = dict(model.named_parameters())
        self.how = how
        self.tables = {id(weights[name]) for name in _TABLES if name in weights}
        # Its own only: a teacher that computes beside it stays exact.
        self.matrices = {id(weight) for name, weight in weights.items() if not name.endswith(_PLAIN)}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stand in for products with a matrix, and for looking into a table."""
        if func is F.linear and id(args[1]) in self.matrices:
            x, weight, *bias = args
            # In half precision the products would round the codes once more.
            with torch.autocast(x.device.type, enabled=False):
                return func(self._inputs(x.float(), weight), self._stored(weight), *bias, **(kwargs or {}))
        if func is F.embedding and id(args[1]) in self.tables:
            args = args[0], self._stored(args[1]), *args[2:]
        elif func is Tensor.__getitem__ and id(args[0]) in self.tables:
            args = self._stored(args[0]), *args[1:]
        return func(*args, **(kwargs or {}))

    def _stored(self, weight: Tensor) -> Tensor:
        is_table = id(weight) in self.tables
        if self.how.scheme != "blockwise" and not (is_table and self.how.table_bits == 4):
            return fake_rows(weight, self.how.bits)
        bits = self.how.table_bits if is_table else self.how.bits
        return fake_blocks(weight, bits, self._block_size(weight))

    def _inputs(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.how.scheme != "blockwise":
            return fake_rows(x)
        # MatMulNBits at accuracy level 4 multiplies integers too, with a scale for each block of a token.
        return fake_rows(x.reshape(*x.shape[:-1], -1, self._block_size(weight))).flatten(-2)

    def _block_size(self, weight: Tensor) -> int:
        is_table = id(weight) in self.tables
        wanted = TABLE_BLOCKS[self.how.table_bits] if is_table else self.how.block_size
        return fitting_block_size(weight.size(1), wanted)
