"""Pushes a service of its own until something would give: overload, idle and leaving clients, slow readers, a soak;
and times how it starts.

Speaks HTTP over raw sockets, to its own machine alone, and prints what it measured; knows nothing of how the service
works. ``python -m loadtests.robustness overload`` and the like; the figures of the last runs are in ``docs/LOG.md``.
"""

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop

ROOT = Path(__file__).parent.parent
HOST = "127.0.0.1"
START_S = 120.0
ANSWER_S = 60.0
"""Longest wait for an answer; one that comes later counts as lost."""
TEXTS: dict[str, dict[str, Any]] = {
    "sentiment": {"input": "A quiet film, and better than it seems."},
    "translate": {"input": "Two men are talking at a table.", "beams": 1},
    "generate": {"input": "Once upon a time", "max_tokens": 64},
}
_METRICS = f"GET /metrics HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode()
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
IDLE_CONNECTIONS = 2_000
LEAVERS = 1_000
SLOW_READERS = 100
CONSTANT_CLIENTS = 16


@dataclass(frozen=True, slots=True)
class Served:
    """A running service."""

    pid: int
    port: int
    ready_s: float
    """From its start until it said that it serves."""

    def cpu_s(self) -> float:
        """CPU time that it has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """Memory that it occupies."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1000

    def descriptors(self) -> int:
        """Files and sockets that it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def served(*flags: str, checkout: Path = ROOT) -> Iterator[Served]:
    """The starters, on a free port, until the block is left; says how the process ended."""
    with TemporaryDirectory() as state:
        command = [sys.executable, "-m", "wattle", "serve", "--port", "0", "--host", HOST, "--state", state, *flags]
        log, began_s = Path(state) / "log", time.monotonic()
        with (
            log.open("w") as errors,
            subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, stderr=errors) as it,
        ):
            assert it.stdout is not None
            address = re.search(rb":(\d+)$", it.stdout.readline().rstrip())
            ready_s = time.monotonic() - began_s
            if address is None:
                raise SystemExit(f"the service did not start: {log.read_text()}")
            try:
                yield Served(it.pid, int(address[1]), ready_s)
            finally:
                it.send_signal(signal.SIGTERM)
                began_s = time.monotonic()
                it.wait(START_S)
                print(f"SIGTERM: over after {time.monotonic() - began_s:.1f} s")
        lines = log.read_text().splitlines()
        print(f"log: {sum('Traceback' in line for line in lines)} tracebacks in {len(lines)} lines")


def post(task: str, body: object) -> bytes:
    """A request to a task's route, as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST /v1/{task} HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


class Connection(asyncio.Protocol):
    """One connection that is kept; requests follow one another on it. Shares the cores with the service, so it does as
    little as it can: of an answer it reads the head and the length."""

    def __init__(self, port: int, *, reads: bool = True) -> None:
        """One that does not read leaves to the sockets what it is answered."""
        self._port, self._reads = port, reads
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._received = b""
        self._left = 0
        """Connections that were closed here, and whose end is still to be told."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See ``asyncio.Protocol``."""
        # uvloop's transports are asyncio's by their methods alone.
        self._transport, self._received = cast(asyncio.Transport, transport), b""
        if not self._reads:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        if self._left:
            self._left -= 1
            return
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the service closed the connection"))

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        self._received += data
        head, end, content = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if end else None
        if end and len(content) >= (int(length[1]) if length else 0):
            self._received = b""
            if self._answer is not None and not self._answer.done():
                self._answer.set_result((int(head.split(None, 2)[1]), content))

    async def open(self) -> None:
        """Connect."""
        await asyncio.get_running_loop().create_connection(lambda: self, HOST, self._port)

    async def send(self, request: bytes) -> None:
        """Send a request, whatever comes of it."""
        if self._transport is None:
            await self.open()
        assert self._transport is not None
        self._transport.write(request)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises ``OSError`` where none comes."""
        async with asyncio.timeout(ANSWER_S):
            self._answer = asyncio.get_running_loop().create_future()
            await self.send(request)
            return await self._answer

    def close(self) -> None:
        """Leave, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()
            self._left += 1
        self._transport = None


@dataclass(slots=True)
class Tally:
    """What came of many requests."""

    seconds: dict[int, list[float]] = field(default_factory=dict)
    """Until the answer, by status."""
    lost: int = 0
    """Without an answer."""

    async def ask(self, connection: Connection, request: bytes) -> int | None:
        """Ask, and count what comes of it; returns the status."""
        began_s = time.perf_counter()
        try:
            status, _ = await connection.ask(request)
        except OSError:
            self.lost += 1
            connection.close()
            return None
        self.seconds.setdefault(status, []).append(time.perf_counter() - began_s)
        return status

    def line(self, elapsed_s: float) -> str:
        """All of it, in milliseconds."""
        parts = []
        for status, seconds in sorted(self.seconds.items()):
            figures = ", ".join(f"p{share} {1000 * quantile(seconds, share):.1f}" for share in (50, 95, 99))
            parts.append(f"{status}: {len(seconds)} ({len(seconds) / elapsed_s:.1f}/s; ms {figures})")
        return "; ".join([*parts, f"lost: {self.lost}"])


def quantile(values: Sequence[float], percent: int) -> float:
    """The value below which ``percent`` of ``values`` lie."""
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else values[0]


async def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> tuple[Tally, float]:
    """So many clients, each of which asks again as soon as it is answered; what came of it, and how long it took."""
    tally, began_s = Tally(), time.perf_counter()

    async def ask_on() -> None:
        connection = Connection(port)
        while time.perf_counter() - began_s < seconds:
            await tally.ask(connection, request)
        connection.close()

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    return tally, time.perf_counter() - began_s


async def open_loop(port: int, request: bytes, per_s: float, seconds: float) -> tuple[Tally, float]:
    """So many requests a second at random moments (a Poisson process), whatever becomes of those before."""
    tally, began_s, next_s, began_cpu_s = Tally(), time.perf_counter(), 0.0, time.process_time()
    free: list[Connection] = []
    asking: set[asyncio.Task[None]] = set()
    late_s: list[float] = []
    chance = random.Random(1)

    async def ask_once() -> None:
        connection = free.pop() if free else Connection(port)
        await tally.ask(connection, request)
        free.append(connection)

    while next_s < seconds:
        await asyncio.sleep(max(0.0, began_s + next_s - time.perf_counter()))
        late_s.append(time.perf_counter() - began_s - next_s)
        task = asyncio.create_task(ask_once())
        asking.add(task)
        task.add_done_callback(asking.discard)
        next_s += chance.expovariate(per_s)
    elapsed_s = time.perf_counter() - began_s
    late_ms, cores = [1000 * quantile(late_s, share) for share in (50, 99)], time.process_time() - began_cpu_s
    own = f"requests left late by ms p50 {late_ms[0]:.1f}, p99 {late_ms[1]:.1f}, {cores / elapsed_s:.2f} cores"
    print(f"{own}: so much is this program's own")
    await asyncio.gather(*asking)
    for connection in free:
        connection.close()
    return tally, elapsed_s


async def metric(port: int, name: str) -> float:
    """The sum of a metric's values."""
    connection = Connection(port)
    _, text = await connection.ask(_METRICS)
    connection.close()
    lines = (line for line in text.decode().splitlines() if re.match(rf"{name}[ {{]", line))
    return sum(float(line.rsplit(None, 1)[1]) for line in lines)


async def until_idle(service: Served) -> float:
    """Wait until nothing waits or runs; returns the seconds that took."""
    began_s = time.perf_counter()
    while await metric(service.port, "wattle_queue_size") + await metric(service.port, "wattle_running_size"):
        await asyncio.sleep(0.05)
    return time.perf_counter() - began_s


async def overload(service: Served, options: argparse.Namespace) -> None:
    """Three times as many requests as can be answered: those accepted keep their latency, the rest is told at once."""
    request = post(options.task, TEXTS[options.task])
    await closed_loop(service.port, request, CONSTANT_CLIENTS, 3)
    tally, elapsed_s = await closed_loop(service.port, request, CONSTANT_CLIENTS, options.seconds)
    print(f"closed loop of {CONSTANT_CLIENTS}: {tally.line(elapsed_s)}")
    capacity = len(tally.seconds[200]) / elapsed_s
    tally, elapsed_s = await open_loop(service.port, request, capacity, options.seconds)
    print(f"at capacity, {capacity:.1f}/s: {tally.line(elapsed_s)}")
    await until_idle(service)
    tally, elapsed_s = await open_loop(service.port, request, 3 * capacity, options.seconds)
    print(f"at three times capacity: {tally.line(elapsed_s)}")


@asynccontextmanager
async def connections(port: int, count: int, *, read: bool = True) -> AsyncIterator[list[Connection]]:
    """So many open connections."""
    opened = [Connection(port, reads=read) for _ in range(count)]
    try:
        for start in range(0, count, 100):
            await asyncio.gather(*(each.open() for each in opened[start : start + 100]))
        yield opened
    finally:
        for each in opened:
            each.close()


async def idle(service: Served, options: argparse.Namespace) -> None:
    """Two thousand connections that say nothing, and others that are answered meanwhile; then all ask at once."""
    request, before_mb = post("sentiment", TEXTS["sentiment"]), service.resident_mb()
    alone, elapsed_s = await closed_loop(service.port, request, 4, options.seconds)
    print(f"without them: {alone.line(elapsed_s)}")
    async with connections(service.port, IDLE_CONNECTIONS) as opened:
        print(f"{IDLE_CONNECTIONS} connections: {before_mb:.0f} MB before, {service.resident_mb():.0f} MB with them")
        beside, elapsed_s = await closed_loop(service.port, request, 4, options.seconds)
        print(f"beside them: {beside.line(elapsed_s)}")
        everybody, began_s = Tally(), time.perf_counter()
        await asyncio.gather(*(everybody.ask(each, request) for each in opened))
        print(f"all at once: {everybody.line(time.perf_counter() - began_s)}")


async def leavers(service: Served, options: argparse.Namespace) -> None:
    """A thousand clients that leave at random moments, and what is left of them."""
    chance = random.Random(1)

    async def leave(number: int, ends: Counter[str]) -> None:
        await asyncio.sleep(chance.uniform(0, options.seconds))
        connection = Connection(service.port)
        task = ("generate", "translate")[number % 2]
        try:
            await connection.send(post(task, {**TEXTS[task], "stream": number % 4 < 2}))
            await asyncio.sleep(chance.uniform(0, 0.5))
            ends["left"] += 1
        except OSError:
            ends["not let in"] += 1
        finally:
            connection.close()

    for turn in (1, 2, 3):
        ends = Counter[str]()
        await asyncio.gather(*(leave(number, ends) for number in range(LEAVERS)))
        emptied_s = await until_idle(service)
        ended = await metric(service.port, "wattle_request_count_total")
        print(
            f"turn {turn}: {dict(ends)}; {ended:.0f} requests closed in all; rows free {emptied_s:.2f} s after the "
            f"last; {service.resident_mb():.0f} MB, {service.descriptors()} descriptors"
        )


async def slow_readers(service: Served, options: argparse.Namespace) -> None:
    """Clients that ask for streams and never read, beside one that does."""
    request = post("sentiment", TEXTS["sentiment"])
    alone, elapsed_s = await closed_loop(service.port, request, 2, options.seconds)
    print(f"without them: {alone.line(elapsed_s)}; {service.resident_mb():.0f} MB")
    body = {"input": [TEXTS["generate"]["input"]] * 4, "max_tokens": 200, "stream": True}
    async with connections(service.port, SLOW_READERS, read=False) as opened:
        for each in opened:
            await each.send(post("generate", body))
        emptied_s = await until_idle(service)
        print(
            f"{SLOW_READERS} streams nobody reads: rows free after {emptied_s:.1f} s, {service.resident_mb():.0f} MB"
        )
        beside, elapsed_s = await closed_loop(service.port, request, 2, options.seconds)
        print(f"beside them: {beside.line(elapsed_s)}")


async def soak(service: Served, options: argparse.Namespace) -> None:
    """All tasks, whole and streamed, some clients leaving, for a long time; memory must stay flat."""
    chance, tally, began_s = random.Random(1), Tally(), time.perf_counter()

    async def ask_on() -> None:
        connection = Connection(service.port)
        while time.perf_counter() - began_s < options.seconds:
            task, body = chance.choice(list(TEXTS.items()))
            if chance.random() < 0.1:
                await connection.send(post(task, body))
                await asyncio.sleep(chance.uniform(0, 0.2))
                connection.close()
            else:
                await tally.ask(connection, post(task, body))
        connection.close()

    async def watch() -> None:
        while (elapsed_s := time.perf_counter() - began_s) < options.seconds:
            print(
                f"{elapsed_s:5.0f} s: {service.resident_mb():.1f} MB, {service.descriptors()} descriptors", flush=True
            )
            await asyncio.sleep(options.seconds / 20)

    await asyncio.gather(watch(), *(ask_on() for _ in range(8)))
    emptied_s = await until_idle(service)
    print(f"{tally.line(options.seconds)}; idle after {emptied_s:.2f} s; {service.resident_mb():.1f} MB")


async def stop(service: Served, options: argparse.Namespace) -> None:
    """SIGTERM under load: what had been accepted is answered, and what comes then finds nobody."""
    tally, ends, request = Tally(), Counter[str](), post("translate", TEXTS["translate"])
    stopping = asyncio.Event()

    async def ask_on() -> None:
        connection = Connection(service.port)
        while True:
            try:
                await connection.open()
            except OSError:
                ends["not let in"] += 1
                return
            late = stopping.is_set()
            status = await tally.ask(connection, request)
            ends[f"asked {'after' if late else 'before'} the signal: {status or 'lost'}"] += 1
            connection.close()

    async def signal_it() -> None:
        await asyncio.sleep(options.seconds)
        os.kill(service.pid, signal.SIGTERM)
        stopping.set()

    began_s = time.perf_counter()
    await asyncio.gather(signal_it(), *(ask_on() for _ in range(CONSTANT_CLIENTS)))
    print(f"{dict(ends)}; {tally.line(time.perf_counter() - began_s)}")


@dataclass(frozen=True, slots=True)
class Start:
    """How long a service took to serve, and what that took."""

    ready_s: float
    answered_s: float
    """Until the answer to its first request."""
    cpu_s: float
    resident_mb: float


async def first_answer(service: Served) -> Start:
    """Ask a service that has just started whether it is ready."""
    connection, began_s = Connection(service.port), time.monotonic()
    status, _ = await connection.ask(f"GET /readyz HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode())
    answered_s = service.ready_s + time.monotonic() - began_s
    connection.close()
    if status != 200:
        raise SystemExit(f"/readyz answered {status}")
    return Start(service.ready_s, answered_s, service.cpu_s(), service.resident_mb())


def start(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Start and stop a service again and again, in turns with that of another checkout."""
    checkouts = [ROOT] if options.beside is None else [ROOT, options.beside]
    starts: dict[Path, list[Start]] = {checkout: [] for checkout in checkouts}
    for turn in range(options.starts):
        for checkout in checkouts if turn % 2 else reversed(checkouts):
            with served(*flags, checkout=checkout) as service:
                starts[checkout].append(uvloop.run(first_answer(service)))
    for checkout, found in starts.items():
        ready_s = sorted(each.ready_s for each in found)
        print(
            f"{checkout}: ready after {statistics.median(ready_s):.2f} s ({ready_s[0]:.2f} to {ready_s[-1]:.2f}, "
            f"{len(found)} starts), first answer after {statistics.median(each.answered_s for each in found):.2f} s, "
            f"CPU {statistics.median(each.cpu_s for each in found):.2f} s, "
            f"{statistics.median(each.resident_mb for each in found):.0f} MB resident"
        )


PROOFS: dict[str, Callable[[Served, argparse.Namespace], Coroutine[Any, Any, None]]] = {
    "overload": overload,
    "idle": idle,
    "leavers": leavers,
    "slow-readers": slow_readers,
    "soak": soak,
    "stop": stop,
}


def main() -> None:
    """Run one of them against a service that is started for it."""
    parser = argparse.ArgumentParser("python -m loadtests.robustness", description=__doc__)
    parser.epilog = "Flags that are not its own are the service's."
    parser.add_argument("proof", choices=["start", *PROOFS])
    parser.add_argument("--seconds", type=float, default=10.0, help="Of each phase, or of the soak.")
    parser.add_argument("--task", choices=TEXTS, default="translate", help="What overload asks for.")
    parser.add_argument("--starts", type=int, default=5, help="How often to start, for start.")
    parser.add_argument("--beside", type=Path, help="Another checkout, which is started in turns with this one.")
    options, flags = parser.parse_known_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if options.proof == "start":
        start(options, flags)
        return
    with served(*flags) as service:
        uvloop.run(PROOFS[options.proof](service, options))


if __name__ == "__main__":
    main()
