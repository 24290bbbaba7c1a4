"""Energy reckoned from CPU time where no counter exists. Knows nothing of requests.

    power = idle watts of the machine's share + (watts of a busy core - its idle watts) x busy cores + memory

A core is what Linux schedules on (a hardware thread). Where the processor is known, a busy core takes
``TDP / cores``, so that a fully loaded machine takes the TDP. Inside a virtual machine neither the processor's
name nor the number of cores is that of the hardware, and the default is used.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from energy.clock import NS_PER_S, Clock
from energy.meters.base import Reading
from energy.types import Quality

DEFAULT_WATTS_PER_CORE = 3.5
"""A fully loaded cloud core. Cloud Carbon Footprint, methodology, Appendix I: AWS average of SPECpower results."""
IDLE_FRACTION = 0.74 / 3.5
"""Idle over full power of a core: same source."""
MEMORY_WATTS_PER_GB = 0.392
"""Same source, section Memory: mean of what Crucial and Micron state for DDR4."""
_PROCESSORS = Path(__file__).parent.parent / "data" / "processors.tsv"


@dataclass(frozen=True, slots=True)
class PowerModel:
    """The constants of an estimate and where they come from."""

    watts_per_core: float
    """Of a fully loaded core."""
    cores: int
    """On which this process may run; their idle power is counted."""
    memory_gb: float
    """Of the machine, in proportion to ``cores``."""
    basis: str


class Estimator:
    """Devices ``cpu`` and ``dram`` of this process: its CPU time, and its cores' and memory's standing power."""

    source = "estimate"

    def __init__(self, model: PowerModel, clock: Clock) -> None:
        idle_w = model.watts_per_core * IDLE_FRACTION
        self.name = f"estimate: {model.basis}"
        self.idle_uw = {
            "cpu": round(idle_w * model.cores * 1e6),
            "dram": round(MEMORY_WATTS_PER_GB * model.memory_gb * 1e6),
        }
        self._active_uw = round((model.watts_per_core - idle_w) * 1e6)
        self._clock = clock
        self._started_ns = clock.monotonic_ns()
        self._started_cpu_ns = clock.process_ns()

    def read(self) -> tuple[Reading, ...]:
        """What the process has taken so far, by the model."""
        at_ns = self._clock.monotonic_ns()
        elapsed_ns = at_ns - self._started_ns
        active = self._active_uw * (self._clock.process_ns() - self._started_cpu_ns) // NS_PER_S
        return tuple(
            Reading(
                device=device,
                source=self.source,
                at_ns=at_ns,
                energy_uj=idle_uw * elapsed_ns // NS_PER_S + (active if device == "cpu" else 0),
                resolution_ns=0,
                quality=Quality.ESTIMATED,
            )
            for device, idle_uw in self.idle_uw.items()
        )


def model_power(watts_per_core: float | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> PowerModel:
    """The constants for this machine; ``watts_per_core`` overrules what is known of its processor."""
    cores = len(os.sched_getaffinity(0))
    all_cores = os.cpu_count() or cores
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 * cores / all_cores
    if watts_per_core is not None:
        return PowerModel(watts_per_core, cores, memory_gb, f"{watts_per_core:g} W per core as configured")
    known = _tdp_per_core(cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else "")
    if known is None:
        basis = f"{DEFAULT_WATTS_PER_CORE:g} W per core, the default for a processor that is not known"
        return PowerModel(DEFAULT_WATTS_PER_CORE, cores, memory_gb, basis)
    watts, name = known
    return PowerModel(watts, cores, memory_gb, f"{watts:.2f} W per core, from the TDP of {name}")


def _tdp_per_core(cpuinfo: str) -> tuple[float, str] | None:
    """Watts per core and the processor's name, from the text of ``/proc/cpuinfo``; None where not known."""
    field = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if not field or re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE):
        return None
    name = _plain(field[1])
    with _PROCESSORS.open(encoding="utf-8") as table:
        next(table)
        for line in table:
            listed, tdp_w = line.rstrip("\n").split("\t")
            if listed.lower() == name:
                sockets = len(set(re.findall(r"^physical id\s*:\s*(\d+)$", cpuinfo, re.MULTILINE))) or 1
                cores = len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE))
                return float(tdp_w) * sockets / cores, listed
    return None


def _plain(name: str) -> str:
    """``Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz`` -> ``intel xeon e5-2680 v4``."""
    name = re.sub(r"\((r|tm)\)|@.*|\bw(/|ith) .*|\d+-cores?\b|\b(cpu|processor)\b|\d+th gen\b", " ", name.lower())
    return " ".join(name.split())
