"""How busy this machine and its processes are. Knows nothing of energy.

A RAPL counter sees the whole machine: what its other processes burn is not the service's to bill.
"""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from energy.clock import NS_PER_S, Clock

_NS_PER_TICK = NS_PER_S // os.sysconf("SC_CLK_TCK")
_INTERVAL_NS = NS_PER_S
"""Kernel ticks are 10 ms: over a second they are good to a percent of a core."""


class Neighbours:
    """CPU time of other processes per time, as of the last second."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._last: tuple[int, int, int] | None = None
        self._cores_milli = 0

    def busy_ns(self, now_ns: int, process_ns: int, window_ns: int) -> int:
        """CPU time that other processes took in the last ``window_ns``, at their rate of the last second.

        ``process_ns`` is this process's own CPU time so far. Where the kernel does not tell, none is assumed.
        """
        if self._last is None or now_ns - self._last[0] >= _INTERVAL_NS:
            self._update(now_ns, process_ns)
        return self._cores_milli * window_ns // 1000

    def _update(self, now_ns: int, process_ns: int) -> None:
        try:
            machine_ns = busy_ns(self._stat)
        except (OSError, ValueError):
            return
        if self._last is not None:
            then_ns, then_process_ns, then_machine_ns = self._last
            others_ns = machine_ns - then_machine_ns - (process_ns - then_process_ns)
            self._cores_milli = max(0, others_ns) * 1000 // (now_ns - then_ns)
        self._last = (now_ns, process_ns, machine_ns)


def busy_ns(stat: Path = Path("/proc/stat")) -> int:
    """CPU time of everything on this machine since it started. Raises ``OSError`` or ``ValueError``."""
    with stat.open(encoding="ascii") as file:
        # cpu user nice system idle iowait irq softirq ...; guests are inside user and nice.
        ticks = [int(word) for word in file.readline().split()[1:8]]
    if len(ticks) < 7:
        raise ValueError(f"{stat} does not begin with the time of all cores")
    return (sum(ticks) - ticks[3] - ticks[4]) * _NS_PER_TICK


@dataclass(frozen=True, slots=True)
class Moment:
    """CPU time of this process and of the whole machine at a time; None where the kernel does not tell."""

    at_ns: int
    own_ns: int
    machine_ns: int | None

    @classmethod
    def now(cls, stat: Path = Path("/proc/stat"), clock: Clock | None = None) -> "Moment":
        """This moment."""
        clock = clock or Clock()
        try:
            machine_ns = busy_ns(stat)
        except (OSError, ValueError):
            machine_ns = None
        return cls(clock.monotonic_ns(), clock.process_ns(), machine_ns)

    def foreign_cores(self, since: "Moment") -> float | None:
        """How many cores other processes have kept busy since then, on average."""
        if self.machine_ns is None or since.machine_ns is None or self.at_ns == since.at_ns:
            return None
        foreign_ns = self.machine_ns - since.machine_ns - (self.own_ns - since.own_ns)
        return round(max(0, foreign_ns) / (self.at_ns - since.at_ns), 2)


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and on x86 whether it has VNNI, the products of 8-bit integers at full speed."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    vnni = "" if flags is None else f" {'with' if 'vnni' in flags[1] else 'without'} VNNI"
    return (name[1].strip() if name else platform.machine()) + vnni


class ProcessTree:
    """A process, its threads and its descendants."""

    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        self._pid = pid
        self._proc = proc
        self._most_ns = 0

    def cpu_ns(self) -> int:
        """CPU time so far; raises ``ProcessLookupError`` once the process is gone."""
        try:
            total_ns = self._sum_ns(self._pid)
        except OSError:
            raise ProcessLookupError(f"there is no process {self._pid}") from None
        # The time of a child that nobody waited for goes with it.
        self._most_ns = max(self._most_ns, total_ns)
        return self._most_ns

    def _sum_ns(self, pid: int) -> int:
        # The name, in parentheses, may hold anything. utime, stime, and those of children that were waited for.
        fields = (self._proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        total_ns = sum(map(int, fields[11:15])) * _NS_PER_TICK
        for task in (self._proc / str(pid) / "task").iterdir():
            try:
                children = (task / "children").read_text().split()
            except OSError:
                continue  # the thread has just ended
            for child in children:
                try:
                    total_ns += self._sum_ns(int(child))
                except OSError:
                    continue
        return total_ns
