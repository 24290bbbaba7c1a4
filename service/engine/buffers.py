"""Arrays of keys and values, a row for each text, kept tight around what they hold. Knows nothing of ONNX or requests.

Attention is fastest where the rows lie close together. So an array's capacity follows its longest row: when that
grows beyond it, all rows are laid out anew.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KEY_BLOCK = 16
"""What grows holds a multiple of this many tokens (``models/graph.py``)."""
_LEAST = 32
_FOUR = 4
"""What does not grow holds a multiple of this many tokens: sums over keys go by fours."""
# Room for a quarter more tokens than there are: laying out costs about as much as attention reading everything once.
_ROOM = 4

Floats = NDArray[np.float32]


class Move(NamedTuple):
    """Tokens ``start`` to ``end`` of row ``source``, to be copied to row ``target``."""

    source: int
    target: int
    start: int
    end: int


class Buffers:
    """One array ``(rows, heads, capacity, head size)`` for each of ``names``.

    Address space is taken for ``max_tokens`` in every row, memory for what was ever laid out.
    """

    def __init__(
        self, names: Sequence[str], n_rows: int, n_heads: int, head_size: int, max_tokens: int, *, grows: bool = True
    ) -> None:
        """``grows`` is whether rows get longer, step by step: then there is room beyond the longest."""
        self._n_rows, self._n_heads, self._head_size = n_rows, n_heads, head_size
        self._grows = grows
        self._most = -(-max_tokens // KEY_BLOCK) * KEY_BLOCK
        size = n_rows * n_heads * self._most * head_size
        # Zeros and not just anything: what attention masks it still multiplies by zero, and that must be a number.
        self._pools = {name: np.zeros(size, dtype=np.float32) for name in names}
        self._spare = np.zeros(size, dtype=np.float32)
        self.capacity = self._fitting(1)
        self.arrays = {name: self._view(pool, self.capacity) for name, pool in self._pools.items()}

    def reserve(self, tokens: int, used: int) -> bool:
        """Make room for ``tokens`` in each row, keeping the first ``used`` rows; True where the arrays are others now.

        Where no row is kept, arrays much larger than ``tokens`` shrink.
        """
        if used and tokens <= self.capacity:
            return False
        wanted = self._fitting(tokens)
        # Rows that lie apart make a step of eight texts 4% slower, of one text not at all, where laying out anew for
        # each text costs that much of it; what is read whole, as a source is, costs more.
        if tokens <= self.capacity <= (4 if self._grows else 2) * wanted:
            return False
        kept = min(self.capacity, wanted)
        for name, array in self.arrays.items():
            moved = self._view(self._spare, wanted)
            moved[:used, :, :kept] = array[:used, :, :kept]
            self._pools[name], self._spare = self._spare, self._pools[name]
            self.arrays[name] = moved
        self.capacity = wanted
        return True

    def copy(self, moves: Sequence[Move]) -> None:
        """Copy between rows, one after the other."""
        for array in self.arrays.values():
            for source, target, start, end in moves:
                array[target, :, start:end] = array[source, :, start:end]

    def adopt(self, row: int, other: "Buffers", end: int) -> None:
        """Let a row begin with the first ``end`` tokens of the first row of ``other``."""
        self.put(row, [array[0, :, :end] for array in other.arrays.values()])

    def get(self, row: int, end: int) -> list[Floats]:
        """Copies of the first ``end`` tokens of a row, ``(heads, end, head size)`` of each array."""
        return [array[row, :, :end].copy() for array in self.arrays.values()]

    def put(self, row: int, parts: Sequence[Floats]) -> None:
        """Let a row begin with ``parts``, as ``get`` returns them."""
        for array, part in zip(self.arrays.values(), parts, strict=True):
            array[row, :, : part.shape[1]] = part

    def _fitting(self, tokens: int) -> int:
        if not self._grows:
            return -(-tokens // _FOUR) * _FOUR
        blocks = -(-(tokens + tokens // _ROOM) // KEY_BLOCK)
        return min(max(blocks * KEY_BLOCK, _LEAST), self._most)

    def _view(self, pool: Floats, capacity: int) -> Floats:
        shape = (self._n_rows, self._n_heads, capacity, self._head_size)
        return pool[: int(np.prod(shape))].reshape(shape)
