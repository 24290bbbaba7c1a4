"""What this processor makes of the graphs' 8-bit products. Knows nothing of graphs or models."""

import platform
from functools import cache
from pathlib import Path
from typing import Protocol


class SessionOptions(Protocol):
    """The part of ``onnxruntime.SessionOptions`` that is needed here."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Set ``key`` to ``value``."""


def keep_products_exact(options: SessionOptions, weight_bits: int = 8) -> None:
    """Make a session's products of 8-bit activations right on every processor.

    Where the processor can't, ONNX Runtime can, more slowly; elsewhere the switch would only cost that. Weights of 7
    bits never need it: 2 x 255 x 63 is still a number of 16 bits.
    """
    if weight_bits != 7 and not _multiplies_8_bits_exactly():
        options.add_session_config_entry("session.x64quantprecision", "1")


@cache
def _multiplies_8_bits_exactly() -> bool:
    """Whether products of unsigned and signed 8-bit integers are added without overflow.

    x86 processors without VNNI add pairs of them in 16 bits, which saturates.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags
