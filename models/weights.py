"""The weights of a model folder, back as the float32 arrays that ``models.graph.write_graphs`` takes.

What was quantised comes back as what its codes stand for. Knows nothing of PyTorch or training.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from models.manifest import Quantisation

Floats = NDArray[np.float32]


def read_weights(folder: Path, stored: Quantisation) -> dict[str, Floats]:
    """All weights that the graphs in ``folder`` read, by name; ``stored`` is what its manifest says of them.

    Raises ``OSError`` where a file is missing.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path in sorted(folder.glob("*.onnx")):
        for name, value in ir.load(path).graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                arrays[name] = value.const_value.numpy()
    weights = {}
    for key, array in arrays.items():
        name, _, kind = key.partition(".codes")
        if key.endswith(".scales"):
            continue
        if name == key:
            weights[key.removesuffix(".T")] = np.ascontiguousarray(array.T if key.endswith(".T") else array)
        elif array.dtype == np.int8:
            codes = array.T if kind == ".T" else array
            weights[name] = np.ascontiguousarray(codes * arrays[f"{name}.scales"][:, None])
        elif kind == ".flat" or f"{key}.flat" not in arrays:
            # What the graphs look up lies flat in them.
            bits = stored.table_bits if kind == ".flat" else stored.bits
            weights[name] = _joined(array, arrays[f"{name}.scales"], bits)
    return weights


def _joined(codes: NDArray[np.uint8], scales: Floats, bits: int) -> Floats:
    """The inverse of ``models.graph.quantize``: codes of any shape and scales (n, blocks) -> (n, k)."""
    n, blocks = scales.shape
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1)
    numbers = codes.reshape(n, blocks, -1).astype(np.float32) - (1 << (bits - 1))
    return (numbers * scales[..., None]).reshape(n, -1)
