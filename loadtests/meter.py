"""This machine's meter, for a server that bills nothing: a process of its own that streams readings as JSON lines.

``python -m loadtests.meter --port 8080`` reads the processor's counters (Linux powercap) where it may, and else
estimates from the CPU time of the process that listens on the port. Knows nothing of requests.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 3.5
IDLE_WATTS_PER_CORE = 0.74
"""Of a cloud core at full load and idle: Cloud Carbon Footprint, methodology, Appendix I, means for AWS."""
IDLE_S = 2.0
"""How long the machine is watched before the load begins, to know what it takes when idle."""
INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of the whole machine, and whose CPU time it went with, since some time in the past."""

    at_s: float
    """Monotonic clock, the same in every process of the machine."""
    energy_j: float
    source: str
    quality: str
    server_cpu_s: float
    """Of the server under test and the processes that it has started."""
    busy_cpu_s: float
    """Of all processes; for the estimate the server's alone, for nobody else's is counted."""


@dataclass(frozen=True, slots=True)
class Metered:
    """What the server took over a run, in joules."""

    energy_j: float
    """Of the whole machine."""
    idle_j: float
    active_j: float
    """Above idle, the server's share: by its part of the CPU time."""
    source: str
    quality: str

    @property
    def allocated_j(self) -> float:
        """The server's active energy and all that the machine would have taken idle."""
        return self.active_j + self.idle_j


def metered(readings: Sequence[Reading], start_s: float, end_s: float) -> Metered | None:
    """Energy between two times, idle power being that before ``start_s``; None where the readings don't reach."""
    before = [reading for reading in readings if reading.at_s <= start_s]
    until = [reading for reading in readings if reading.at_s <= end_s]
    if len(before) < 2 or len(until) <= len(before):
        return None
    idle_w = (before[-1].energy_j - before[0].energy_j) / (before[-1].at_s - before[0].at_s)
    first, last = before[-1], until[-1]
    energy_j = last.energy_j - first.energy_j
    idle_j = min(energy_j, idle_w * (last.at_s - first.at_s))
    busy_s = last.busy_cpu_s - first.busy_cpu_s
    share = min(1.0, (last.server_cpu_s - first.server_cpu_s) / busy_s) if busy_s else 0.0
    return Metered(energy_j, idle_j, (energy_j - idle_j) * share, last.source, last.quality)


class MachineMeter:
    """The meter as a subprocess; ``readings`` grows until it is closed."""

    def __init__(self, port: int, interval_s: float = INTERVAL_S) -> None:
        command = [sys.executable, "-m", "loadtests.meter", "--port", str(port), "--interval", str(interval_s)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
        )
        self.readings: list[Reading] = []
        self.failure = ""
        self._thread = threading.Thread(target=self._listen, name="meter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the subprocess."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None and self._process.stderr is not None
        for line in self._process.stdout:
            self.readings.append(Reading(**json.loads(line)))
        # On purpose after the readings: what it complains about is one line, its last.
        self.failure = (self._process.stderr.read().strip().splitlines() or [""])[-1]


def read_forever(port: int, root: Path, interval_s: float) -> Iterator[Reading]:
    """A reading every ``interval_s``. Raises ``LookupError`` where no process listens on ``port``."""
    server = find_listener(port)
    counters = Counters(root)
    source, quality = ("powercap", "measured") if counters.found else ("estimate", "estimated")
    cores = len(os.sched_getaffinity(0))
    started_s = time.monotonic()
    seen = Processes(server)
    while True:
        now_s = time.monotonic()
        server_cpu_s = seen.cpu_s()
        if counters.found:
            energy_j, busy_cpu_s = counters.read_j(), sum(_busy_times())
        else:
            idle_j = IDLE_WATTS_PER_CORE * cores * (now_s - started_s)
            energy_j = idle_j + (WATTS_PER_CORE - IDLE_WATTS_PER_CORE) * server_cpu_s
            busy_cpu_s = server_cpu_s
        yield Reading(now_s, energy_j, source, quality, server_cpu_s, busy_cpu_s)
        time.sleep(max(0.0, now_s + interval_s - time.monotonic()))


class Counters:
    """The energy counters of all processor packages and their memory, unwrapped; none where they may not be read."""

    def __init__(self, root: Path) -> None:
        self._last: dict[Path, int] = {}
        self._ranges: dict[Path, int] = {}
        self._total_uj = 0
        # intel-rapl-mmio lists the packages once more; psys holds them; core and uncore are held by them.
        for zone in sorted(root.glob("intel-rapl:*")):
            with contextlib.suppress(OSError, ValueError):
                name = (zone / "name").read_text(encoding="ascii").strip()
                if name.startswith("package-") or name == "dram":
                    self._ranges[zone] = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                    self._last[zone] = int((zone / "energy_uj").read_text(encoding="ascii"))

    @property
    def found(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._last)

    def read_j(self) -> float:
        """Joules since the beginning."""
        for zone, last_uj in self._last.items():
            now_uj = int((zone / "energy_uj").read_text(encoding="ascii"))
            self._total_uj += (now_uj - last_uj) % self._ranges[zone]
            self._last[zone] = now_uj
        return self._total_uj / 1e6


class Processes:
    """CPU time of a process and all that it has started; it never falls when one of them ends."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._seen: dict[int, float] = {}

    def cpu_s(self) -> float:
        """Seconds on all cores together."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._server, *self._server.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    self._seen[process.pid] = times.user + times.system
        return sum(self._seen.values())


def find_listener(port: int) -> psutil.Process:
    """The process that listens on a TCP port. Raises ``LookupError``."""
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            process = psutil.Process(connection.pid)
            # A server's workers inherit its socket: its first process is the one whose parent does not hold it.
            while (parent := process.parent()) is not None and _listens(parent, port):
                process = parent
            return process
    raise LookupError(
        f"no process that this user may see listens on port {port}: "
        "run the load test as the server's user, or as root, on the server's machine"
    )


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections)


def _busy_times() -> tuple[float, ...]:
    times = psutil.cpu_times()
    # Guests' time is part of user's and nice's.
    return times.user, times.nice, times.system, times.irq, times.softirq


def main(arguments: Sequence[str] | None = None, out: IO[str] = sys.stdout) -> int:
    """Stream readings until nobody listens."""
    parser = argparse.ArgumentParser("python -m loadtests.meter", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="TCP port of the server under test")
    parser.add_argument("--interval", type=float, default=INTERVAL_S, help="seconds between two readings")
    parser.add_argument("--powercap-root", type=Path, default=POWERCAP, help="Linux powercap tree")
    options = parser.parse_args(arguments)
    try:
        for reading in read_forever(options.port, options.powercap_root, options.interval):
            print(json.dumps(asdict(reading)), file=out, flush=True)
    except (LookupError, OSError) as error:
        print(f"meter: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
