"""This machine's meter, for a server that bills nothing: `wattle meters --stream`, as a process of its own.

Knows nothing of requests.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
IDLE_S = 2.0
"""How long the machine is watched before the load begins, to know what it takes when idle."""
PATIENCE_S = 15.0
"""How long the first reading may take."""
INTERVAL_S = 0.1
WEAKEST_FIRST = ("estimated", "apportioned", "measured")


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of this machine since some time in the past, and whose CPU time it went with."""

    at_s: float
    """Seconds since 1970."""
    cpu_j: float
    """Of processors and memory."""
    gpu_j: float
    source: str
    quality: str
    server_cpu_s: float
    """CPU time of the server under test and the processes that it has started."""
    busy_cpu_s: float
    """CPU time of all that ``cpu_j`` counts: of the whole machine, or for an estimate of the server alone."""


@dataclass(frozen=True, slots=True)
class Metered:
    """What the server took over a run, in joules."""

    energy_j: float
    """Of the whole machine, or of the server where it is an estimate."""
    idle_j: float
    active_j: float
    """Above idle, the server's share: all of the GPUs', and of the processors' its part of the CPU time."""
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
    rest, first, last = before[0], before[-1], until[-1]
    factor = (last.at_s - first.at_s) / (first.at_s - rest.at_s)
    cpu_j, gpu_j = last.cpu_j - first.cpu_j, last.gpu_j - first.gpu_j
    cpu_idle_j = min(cpu_j, (first.cpu_j - rest.cpu_j) * factor)
    gpu_idle_j = min(gpu_j, (first.gpu_j - rest.gpu_j) * factor)
    busy_s = last.busy_cpu_s - first.busy_cpu_s
    share = min(1.0, (last.server_cpu_s - first.server_cpu_s) / busy_s) if busy_s else 0.0
    return Metered(
        energy_j=cpu_j + gpu_j,
        idle_j=cpu_idle_j + gpu_idle_j,
        active_j=(cpu_j - cpu_idle_j) * share + gpu_j - gpu_idle_j,
        source=last.source,
        quality=last.quality,
    )


class MachineMeter:
    """The meter as a subprocess, for the server that listens on a port; ``readings`` grows until it is closed."""

    def __init__(self, port: int, interval_s: float = INTERVAL_S) -> None:
        self.readings: list[Reading] = []
        self.failure = ""
        """Why there are no readings any more; empty as long as there are."""
        self._closed = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._listen, args=(port, interval_s), name="meter", daemon=True)
        self._thread.start()

    def watch_idle(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until enough is known of the machine at rest, or there is no meter."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not self.readings and not self.failure and time.monotonic() < deadline_s:
            sleep(0.1)
        if not self.failure:
            sleep(IDLE_S + INTERVAL_S)

    def close(self) -> None:
        """End the subprocess."""
        self._closed = True
        if self._process is not None:
            self._process.terminate()
        self._thread.join()

    def _listen(self, port: int, interval_s: float) -> None:
        try:
            server = find_listener(port)
        except LookupError as error:
            self.failure = str(error)
            return
        processes = Processes(server)
        command = [sys.executable, "-m", "wattle", "meters", "--stream", "--pid", str(server.pid)]
        command += ["--sample-interval-ms", str(round(1000 * interval_s))]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as self._process:
            assert self._process.stdout is not None and self._process.stderr is not None
            if self._closed:
                self._process.terminate()
            for line in self._process.stdout:
                self.readings.append(read_line(line, processes))
            said = (self._process.stderr.read().strip().splitlines() or ["it ended"])[-1]
        self.failure = said if not self._closed else ""


def read_line(line: str, processes: "Processes") -> Reading:
    """A line of the meter, and the CPU times at this moment."""
    found = json.loads(line)
    devices: list[dict[str, Any]] = found["devices"]
    quality = next((each for each in WEAKEST_FIRST if any(d["quality"] == each for d in devices)), "unavailable")
    # An estimate counts nobody's CPU time but the server's.
    estimated = any(device["source"] == "estimate" for device in devices)
    server_cpu_s = processes.cpu_s()
    return Reading(
        at_s=found["time_s"],
        cpu_j=sum(device["energy_j"] for device in devices if not device["device"].startswith("gpu")),
        gpu_j=sum(device["energy_j"] for device in devices if device["device"].startswith("gpu")),
        source="+".join(sorted({device["source"] for device in devices})),
        quality=quality,
        server_cpu_s=server_cpu_s,
        busy_cpu_s=server_cpu_s if estimated else sum(_busy_times()),
    )


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
