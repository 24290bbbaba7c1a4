"""The parent's side of the workers: starts, pins, stops and times them, and watches who else uses the processor.

Knows nothing of workloads or results.
"""

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtests.peers.worker import Ids, Load, Ran, Run

ROOT = Path(__file__).parents[2]
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class WorkerFailed(Exception):
    """A peer's process died, did not answer in time, or answered with an error."""


class Worker:
    """One process, which computes for one peer. Stopped by a signal except while it is asked: nothing of it spins."""

    def __init__(self, python: Path, module: str, log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [str(python), "-m", f"loadtests.peers.{module}"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Without a network nothing asks for a newer model, and a peer's progress bars and telemetry stay quiet.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message; ``answer`` has to follow."""
        self._signal(signal.SIGCONT)
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"the process has ended; see {self._log.name}") from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """What the process answers. Raises ``WorkerFailed``."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerFailed(f"no answer within {timeout_s:.0f} s") from None
        if not line:
            raise WorkerFailed(f"the process ended with {self._process.wait()}; see {self._log.name}")
        self._signal(signal.SIGSTOP)
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise WorkerFailed(message["error"])
        return message

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            # What was not read any more is still to be flushed.
            with suppress(BrokenPipeError):
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


class Team:
    """The processes that compute side by side for one peer with one model: one, or one for each replica."""

    def __init__(self, python: Path, module: str, order: Load, log: Path, *, native_replicas: bool) -> None:
        """Start and load; with ``native_replicas`` one process computes for all replicas. Raises ``WorkerFailed``."""
        self.order = order
        orders = [order] if native_replicas else split_order(order)
        self._workers: list[Worker] = []
        self.versions: dict[str, str] = {}
        try:
            for each in orders:
                worker = Worker(python, module, log)
                self._workers.append(worker)
                worker.tell({"load": asdict(each)})
            for worker in self._workers:
                self.versions = worker.answer(300)["versions"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, run: Run, timeout_s: float = 300) -> Ran:
        """Share the rows out, and wait for the last process: from the first start to the last end."""
        shares = share_out(run.rows, len(self._workers))
        busy = [(worker, places) for worker, places in zip(self._workers, shares, strict=True) if places]
        for worker, places in busy:
            worker.tell({"run": {**asdict(run), "rows": [run.rows[place] for place in places]}})
        answers = [Ran(**worker.answer(timeout_s)) for worker, _ in busy]
        outputs: Any = None
        if run.with_outputs:
            outputs = [[]] * len(run.rows)
            for (_, places), answer in zip(busy, answers, strict=True):
                for place, output in zip(places, answer.outputs or (), strict=True):
                    outputs[place] = output
        return Ran(
            min(answer.started_s for answer in answers),
            max(answer.ended_s for answer in answers),
            sum(answer.cpu_s for answer in answers),
            outputs,
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()


def split_order(order: Load) -> list[Load]:
    """One order for each replica, on cores of its own."""
    fields = asdict(order)
    return [
        Load(**{**fields, "replicas": 1, "cores": order.cores[number * order.threads : (number + 1) * order.threads]})
        for number in range(order.replicas)
    ]


def share_out(rows: Ids, count: int) -> list[list[int]]:
    """Places of ``rows`` for each of ``count`` processes: equally many, and of all lengths."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]), reverse=True)
    return [sorted(order[number::count]) for number in range(count)]


def busy_cpu_s(stat: str) -> float:
    """Seconds that all cores have computed for anybody, from the text of ``/proc/stat``; stolen time counts too."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def group_cpu_s(group: int) -> float:
    """Seconds that the living processes of a process group have computed, from ``/proc``."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks * _TICK_S


class Watch:
    """How many cores somebody else has used since its making."""

    def __init__(self) -> None:
        self._start = self._read()

    def foreign_cores(self, own_s: float, elapsed_s: float) -> float:
        """``own_s`` are the seconds that the measured processes took; below zero is the clock's coarseness."""
        return max(0.0, (self._read() - self._start - own_s) / elapsed_s)

    def _read(self) -> float:
        return busy_cpu_s(Path("/proc/stat").read_text(encoding="ascii"))


def cores() -> Sequence[int]:
    """Where this process may run."""
    return sorted(os.sched_getaffinity(0))
