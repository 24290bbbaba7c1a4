"""NVIDIA GPUs through NVML. Knows nothing of requests; ``nvidia-ml-py`` is imported only when it is asked for."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from energy.clock import Clock
from energy.meters.base import Reading, Unavailable
from energy.types import Quality

_log = logging.getLogger(__name__)
COARSEST_NS = 100_000_000
"""The energy counter and the power sensor move in steps of up to 100 ms."""
_STILL_NS = 2 * COARSEST_NS
"""A counter that has not moved for so long has nothing to count."""


class _Gpu:
    """One GPU's energy: its counter where it has one, else its power integrated over time (trapezoids)."""

    def __init__(self, library: Any, index: int, now_ns: int) -> None:
        """Raises ``NVMLError``, and ``_Divided`` where the counter sees more than one tenant."""
        self._library = library
        self._handle = library.nvmlDeviceGetHandleByIndex(index)
        if self._is_divided():
            raise _Divided
        self.device = f"gpu:{index}"
        self.resolution_ns = COARSEST_NS
        """The shortest time between two moves that has been seen."""
        self._aligned = False
        """Whether ``read_ns`` is the time of a move."""
        self.total_uj = 0
        self.read_ns = now_ns
        try:
            self._last_mj = self._counter_mj()
            self.counts = True
        except library.NVMLError:
            self._last_mw = self._power_mw()
            self.counts = False

    def advance(self, now_ns: int) -> None:
        if not self.counts:
            now_mw = self._power_mw()
            self.total_uj += (self._last_mw + now_mw) * (now_ns - self.read_ns) // 2_000_000
            self._last_mw = now_mw
            self.read_ns = now_ns
            return
        now_mj = self._counter_mj()
        if now_mj == self._last_mj and now_ns - self.read_ns < _STILL_NS:
            # Between its moves the counter tells of the past: this is no reading of now.
            return
        if now_mj > self._last_mj:
            # The counter starts again at 0 when the driver is loaded anew; what ran meanwhile is not known.
            self.total_uj += (now_mj - self._last_mj) * 1000
            if self._aligned:
                self.resolution_ns = min(self.resolution_ns, now_ns - self.read_ns)
            self._aligned = True
        self._last_mj = now_mj
        self.read_ns = now_ns

    def _is_divided(self) -> bool:
        try:
            mode, _ = self._library.nvmlDeviceGetMigMode(self._handle)
        except self._library.NVMLError:
            return False  # too old to be divided
        return bool(mode)

    def _counter_mj(self) -> int:
        return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def _power_mw(self) -> int:
        return int(self._library.nvmlDeviceGetPowerUsage(self._handle))


class _Divided(Exception):
    pass


class Nvml:
    """A set of GPUs, each read as of the last move of its counter that was seen."""

    source = "nvml"

    def __init__(self, library: Any, gpus: Sequence[_Gpu], missing: Sequence[str], clock: Clock) -> None:
        self._library = library
        self._gpus = gpus
        self._clock = clock
        self._failing = False
        self.idle_uw: Mapping[str, int] = {}
        kinds = [f"{gpu.device} ({'energy counter' if gpu.counts else 'integrated power'})" for gpu in gpus]
        self.name = f"NVML: {', '.join([*kinds, *missing])}"

    def read(self) -> tuple[Reading, ...]:
        """The latest reading of every GPU, or none where the driver has gone."""
        try:
            for gpu in self._gpus:
                gpu.advance(self._clock.monotonic_ns())
        except self._library.NVMLError as error:
            if not self._failing:
                _log.warning("NVML cannot be read any more: %s", error)
            self._failing = True
            return ()
        if self._failing:
            _log.warning("NVML is read again")
        self._failing = False
        return tuple(
            Reading(
                device=gpu.device,
                source=self.source,
                at_ns=gpu.read_ns,
                energy_uj=gpu.total_uj,
                resolution_ns=gpu.resolution_ns,
                # Power is seen only when somebody asks: between two looks its integral is a guess.
                quality=Quality.MEASURED if gpu.counts else Quality.ESTIMATED,
            )
            for gpu in self._gpus
        )


def open_nvml(indices: Sequence[int] | None, clock: Clock, library: Any = None) -> Nvml | Unavailable:
    """The meter of the GPUs with these indices, None for all, or why there is none.

    GPUs that cannot be read are named beside those that can. ``library`` is the module ``pynvml``, imported here where
    it is not given.
    """
    if library is None:
        try:
            import pynvml
        except ImportError:
            return Unavailable("nvidia-ml-py is not installed; it comes with the extra [gpu]")
        library = pynvml
    gpus: list[_Gpu] = []
    missing: list[str] = []
    try:
        library.nvmlInit()
        for index in range(library.nvmlDeviceGetCount()) if indices is None else indices:
            try:
                gpus.append(_Gpu(library, index, clock.monotonic_ns()))
            except _Divided:
                missing.append(
                    f"gpu:{index} not read: it is divided (MIG), and its counter sees all instances together; bills "
                    "of one would hold what the others take. Switch MIG off to have it metered"
                )
            except library.NVMLError as error:
                missing.append(f"gpu:{index} not read: {error}")
    except library.NVMLError as error:
        return Unavailable(f"NVML says: {error}")
    if not gpus:
        return Unavailable("; ".join(missing) or "NVML finds no GPU")
    return Nvml(library, gpus, missing, clock)
