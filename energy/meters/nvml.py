"""NVIDIA GPUs through NVML. Knows nothing of requests; ``nvidia-ml-py`` is imported only when it is asked for."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from energy.clock import Clock
from energy.meters.base import Reading, Unavailable
from energy.types import Quality

_log = logging.getLogger(__name__)
RESOLUTION_NS = 100_000_000
"""The energy counter and the power sensor move in steps of up to 100 ms."""


class _Gpu:
    """One GPU's energy: its counter where it has one, else its power integrated over time (trapezoids)."""

    def __init__(self, library: Any, index: int, now_ns: int) -> None:
        self._library = library
        self._handle = library.nvmlDeviceGetHandleByIndex(index)
        self.device = f"gpu:{index}"
        self.total_uj = 0
        self.read_ns = now_ns
        try:
            self._last_mj = self._counter_mj()
            self.counts = True
        except library.NVMLError:
            self._last_mw = self._power_mw()
            self.counts = False

    def advance(self, now_ns: int) -> None:
        if self.counts:
            now_mj = self._counter_mj()
            # The counter starts again at 0 when the driver is loaded anew; what ran meanwhile is not known.
            self.total_uj += max(0, now_mj - self._last_mj) * 1000
            self._last_mj = now_mj
        else:
            now_mw = self._power_mw()
            self.total_uj += (self._last_mw + now_mw) * (now_ns - self.read_ns) // 2_000_000
            self._last_mw = now_mw
        self.read_ns = now_ns

    def _counter_mj(self) -> int:
        return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def _power_mw(self) -> int:
        return int(self._library.nvmlDeviceGetPowerUsage(self._handle))


class Nvml:
    """A set of GPUs, each read at most once per step of its counter, for a call may take a millisecond."""

    source = "nvml"

    def __init__(self, library: Any, gpus: Sequence[_Gpu], clock: Clock) -> None:
        self._library = library
        self._gpus = gpus
        self._clock = clock
        self._failing = False
        self.idle_uw: Mapping[str, int] = {}
        kinds = (f"{gpu.device} ({'energy counter' if gpu.counts else 'integrated power'})" for gpu in gpus)
        self.name = f"NVML: {', '.join(kinds)}"

    def read(self) -> tuple[Reading, ...]:
        """The latest reading of every GPU, or none where the driver has gone."""
        now_ns = self._clock.monotonic_ns()
        try:
            for gpu in self._gpus:
                if now_ns - gpu.read_ns >= RESOLUTION_NS:
                    gpu.advance(now_ns)
        except self._library.NVMLError as error:
            if not self._failing:
                _log.warning("NVML cannot be read any more: %s", error)
            self._failing = True
            return ()
        self._failing = False
        return tuple(
            Reading(
                device=gpu.device,
                source=self.source,
                at_ns=gpu.read_ns,
                energy_uj=gpu.total_uj,
                resolution_ns=RESOLUTION_NS,
                # Power is seen only when somebody asks: between two looks its integral is a guess.
                quality=Quality.MEASURED if gpu.counts else Quality.ESTIMATED,
            )
            for gpu in self._gpus
        )


def open_nvml(indices: Sequence[int], clock: Clock, library: Any = None) -> Nvml | Unavailable:
    """The meter of the GPUs with these indices, or why there is none.

    ``library`` is the module ``pynvml``, imported here where it is not given.
    """
    if library is None:
        try:
            import pynvml
        except ImportError:
            return Unavailable("nvidia-ml-py is not installed; it comes with the extra [gpu]")
        library = pynvml
    try:
        library.nvmlInit()
        gpus = [_Gpu(library, index, clock.monotonic_ns()) for index in indices]
    except library.NVMLError as error:
        return Unavailable(f"NVML says: {error}")
    return Nvml(library, gpus, clock)
