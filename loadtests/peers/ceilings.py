"""What this machine can do at most: the rates of products and of memory, measured, and a workload's share of them.

    python -m loadtests.peers.ceilings torch | onnxruntime | memory

prints the rates that one library reaches, on all cores; a process for each, so that no two libraries' threads meet.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loadtests.peers.workloads import Workload

_TRIALS = 20
_MOST_S = 3.0
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")

Rates = Mapping[str, float]
"""``fp32``, ``bf16``, ``int8``: operations per second. ``memory``, ``cache``: bytes read per second."""


def measure(python: Path, root: Path) -> dict[str, float]:
    """The best rate of any library, in the project's environment."""
    rates: dict[str, float] = {}
    for library in ("torch", "onnxruntime", "memory"):
        done = subprocess.run(
            [str(python), "-m", "loadtests.peers.ceilings", library],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        for name, rate in json.loads(done.stdout).items():
            rates[name] = max(rate, rates.get(name, 0))
    return rates


def cache_bytes() -> int:
    """The last-level cache; 0 where the system does not say."""
    sizes = [(path / "size").read_text().strip() for path in _CACHE.glob("index*") if (path / "size").exists()]
    return max((int(size.rstrip("KM")) << (20 if size.endswith("M") else 10) for size in sizes), default=0)


def least_s(workload: Workload, tokens: int, bits: int, rate: float, rates: Rates, cache: int) -> float:
    """The time that the workload would take at the ceilings, products and reads of weights alone.

        phase = max(2 x parameters x tokens / rate of products, bytes of the parameters x passes / rate of reads)

    summed over reading (one pass) and writing (a pass per token, all rows at once). Weights that fit the last-level
    cache are read at its rate. Attention, embeddings and everything between the products count nothing. ``tokens``
    are read, padding apart; ``rate`` is that of the variant's arithmetic.
    """
    shape = workload.shape
    reading = shape.source_parameters
    if shape.kind == "generate":
        # A prompt passes all layers; only its last token the output layer.
        reading = shape.target_parameters - shape.d_model * shape.vocab_size
    fits = (shape.source_parameters + shape.target_parameters) * bits / 8 <= cache
    read_rate = rates["cache" if fits else "memory"]

    def phase(parameters: int, tokens: int, passes: int) -> float:
        return max(2 * parameters * tokens / rate, parameters * bits / 8 * passes / read_rate)

    written = workload.new_tokens * workload.at_once * workload.beams
    return phase(reading, tokens, 1) + phase(shape.target_parameters, written, workload.new_tokens)


def _best(amount: float, compute: Callable[[], object]) -> float:
    """``amount`` per second in the fastest of some trials."""
    compute()
    times: list[float] = []
    while len(times) < _TRIALS and sum(times) < _MOST_S:
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return amount / min(times)


def _torch() -> dict[str, float]:
    import torch

    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.randn(1024, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        with torch.inference_mode():
            rates[name] = _best(2 * 1024 * 2048 * 2048, lambda left=left, right=right: left @ right)  # type: ignore[misc]
    return rates


def _onnxruntime() -> dict[str, float]:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rates = {}
    for name, op, left, right, out in (
        ("fp32", "MatMul", np.float32, np.float32, TensorProto.FLOAT),
        ("int8", "MatMulInteger", np.uint8, np.int8, TensorProto.INT32),
    ):
        weight = numpy_helper.from_array(np.ones((2048, 2048), right), "b")
        graph = helper.make_graph(
            [helper.make_node(op, ["a", "b"], ["y"])],
            "product",
            [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(np.dtype(left)), (1024, 2048))],
            [helper.make_tensor_value_info("y", out, (1024, 2048))],
            [weight],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {"a": np.ones((1024, 2048), left)}
        rates[name] = _best(2 * 1024 * 2048 * 2048, lambda session=session, feeds=feeds: session.run(None, feeds))  # type: ignore[misc]
    return rates


def _memory() -> dict[str, float]:
    import numpy as np

    count = len(os.sched_getaffinity(0))
    rates = {}
    with ThreadPoolExecutor(count) as pool:
        for name, size, times in (("memory", 256 << 20, 1), ("cache", 4 << 20, 40)):
            arrays = [np.ones(size // 4, np.float32) for _ in range(count)]

            def read(arrays: Sequence[Any] = arrays, times: int = times) -> None:
                # A dot product reads and does little else, without the interpreter's lock.
                list(pool.map(lambda array: [np.dot(array, array) for _ in range(times)], arrays))

            rates[name] = _best(size * count * times, read)
    return rates


if __name__ == "__main__":
    print(json.dumps({"torch": _torch, "onnxruntime": _onnxruntime, "memory": _memory}[sys.argv[1]]()))
