"""Measures through HTTP: the starters served by Wattle and by LitServe, the same clients taking turns at both.

Beside them Wattle's engine alone is asked the same by as many clients: what HTTP, tokenising and bills take from it.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtests.peers.environments import make, python_of, version_of
from loadtests.peers.power import Meter
from loadtests.peers.processes import ROOT, Watch, WorkerFailed, cores, group_cpu_s
from loadtests.peers.records import Record, Records

CLIENTS = (1, 8, 32, 64)
_SENTENCES = Path(__file__).parent / "sentences.txt"
_START_TIMEOUT_S = 90
_MOST_BODIES = 64
_SECONDS = 2.5
"""Of a sample: with five rounds all of this takes some ten minutes."""
_QUICK_SECONDS = 1.0
ENGINE = "engine"
"""The side that is no server."""
LITSERVE = {"litserve": "litserve_server", "litserve torch": "litserve_torch"}
"""Modules of the sides that LitServe serves."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a server divides the machine."""

    workers: int
    threads: int
    batch: int

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.workers} x {self.threads}" + (f", batches of {self.batch}" if self.batch else "")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is asked for."""

    name: str
    starter: str
    wattle_path: str
    parameters: dict[str, Any]
    """For Wattle beside the text; of these the other sides know ``max_tokens``."""
    answer: Callable[[Any], str]
    """What Wattle's body says."""
    sides: tuple[str, ...] = ("wattle", "litserve")
    """The servers that are asked."""
    ending: str = ""
    """What every text ends with."""

    @property
    def texts(self) -> list[str]:
        """What all sides are given, one by one."""
        return [text + self.ending for text in _SENTENCES.read_text(encoding="utf-8").splitlines()[:_MOST_BODIES]]

    @property
    def max_tokens(self) -> int:
        """Of a text that is written; 0 is as many as the starter's manifest says."""
        return int(self.parameters.get("max_tokens", 0))


ENDPOINTS = (
    Endpoint(
        "sentiment",
        "sentiment-en",
        "/v1/sentiment",
        {},
        lambda body: str(body["results"][0]["label"]),
        sides=("wattle", *LITSERVE),
    ),
    Endpoint(
        "translation", "translate-en-de", "/v1/translate", {"beams": 1}, lambda body: str(body["results"][0]["text"])
    ),
    Endpoint(
        "generation",
        "generate-en",
        "/v1/generate",
        {"chat": False, "temperature": 0, "max_tokens": 32},
        lambda body: str(body["results"][0]["text"]),
        # Behind a whole sentence the starter mostly ends at once; behind this it writes 31 tokens of 32.
        ending=" He said:",
    ),
)


def settings(side: str, count: int) -> list[Setting]:
    """Those that are tried; Wattle is measured as it starts by itself, but takes in all clients."""
    if side == "wattle":
        return [Setting(count, 1, 0)]
    return [Setting(count // threads, threads, batch) for threads in (1, count) for batch in (1, 16, 64)]


class Server:
    """One server process and its children; stopped by a signal except while it is asked."""

    def __init__(self, command: Sequence[str], port: int, log: Path, environment: dict[str, str]) -> None:
        """Start it and wait until it answers. Raises ``WorkerFailed``."""
        self._log = log.open("ab")
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        self._signal(signal.SIGCONT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGSTOP)

    @property
    def cpu_s(self) -> float:
        """Of all its processes."""
        return group_cpu_s(self._process.pid)

    def close(self) -> None:
        """End all of it."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        end = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise WorkerFailed(f"the server ended with {self._process.returncode}; see {self._log.name}")
            try:
                # Both answer a health check when the models are loaded: /readyz is Wattle's, /health LitServe's.
                for path in ("/readyz", "/health"):
                    try:
                        with urllib.request.urlopen(self.url + path, timeout=5):
                            return
                    except urllib.error.HTTPError as error:
                        if error.code not in (404, 503):
                            raise
            except OSError:
                pass
            time.sleep(0.2)
        raise WorkerFailed(f"the server did not answer within {_START_TIMEOUT_S} s; see {self._log.name}")

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def measure(root: Path, rounds: int, records: Records, machine: Record, *, quick: bool) -> None:
    """Measure every endpoint at every number of clients that ``records`` does not hold yet, on ``machine``."""
    if failure := make(root, "http"):
        records.add("absent", peer="http", variant="", shape="", reason=failure)
        print(f"no comparison through HTTP: {failure}", flush=True)
        return
    seconds = _QUICK_SECONDS if quick else _SECONDS
    if not records.find("http machine"):
        records.add("http machine", litserve=version_of("http", "litserve"), **machine)
    for endpoint in ENDPOINTS:
        try:
            best = {side: _best(root, side, endpoint, seconds, records, quick=quick) for side in endpoint.sides}
            _rounds(root, endpoint, best, rounds, seconds, records)
        except WorkerFailed as error:
            records.add("absent", peer="http", variant="", shape=endpoint.name, reason=str(error))
            print(f"no comparison of {endpoint.name} through HTTP: {error}", flush=True)


def _best(
    root: Path, side: str, endpoint: Endpoint, seconds: float, records: Records, *, quick: bool
) -> dict[int, Setting]:
    """The fastest setting for each number of clients."""
    choices = settings(side, len(cores()))
    if quick or len(choices) == 1:
        return dict.fromkeys(CLIENTS, choices[-2] if len(choices) > 1 else choices[0])
    for setting in choices:
        if records.find("http try", endpoint=endpoint.name, side=side, setting=asdict(setting)):
            continue
        print(f"trying {side}, {setting.text}: {endpoint.name}", flush=True)
        server = _start(root, side, endpoint, setting)
        try:
            with server:
                speeds = {
                    str(clients): _drive(root, server, side, endpoint, clients, seconds / 2)["per_s"]
                    for clients in CLIENTS
                }
        finally:
            server.close()
        records.add("http try", endpoint=endpoint.name, side=side, setting=asdict(setting), per_s=speeds)
    tries = records.find("http try", endpoint=endpoint.name, side=side)
    return {
        clients: Setting(**max(tries, key=lambda record: record["per_s"][str(clients)])["setting"])
        for clients in CLIENTS
    }


def _rounds(
    root: Path,
    endpoint: Endpoint,
    best: dict[str, dict[int, Setting]],
    rounds: int,
    seconds: float,
    records: Records,
) -> None:
    with ExitStack() as stack:
        servers: dict[tuple[str, Setting], Server] = {}
        for clients in CLIENTS:
            for number in range(rounds):
                sides = [*best, ENGINE]
                for side in sides if number % 2 == 0 else sides[::-1]:
                    fields = {"endpoint": endpoint.name, "clients": clients, "side": side, "round": number}
                    if records.find("http sample", **fields):
                        continue
                    if side == ENGINE:
                        records.add("http sample", **fields, **_engine_sample(root, endpoint, clients, seconds))
                        continue
                    setting = best[side][clients]
                    if (side, setting) not in servers:
                        server = _start(root, side, endpoint, setting)
                        stack.callback(server.close)
                        servers[side, setting] = server
                        with server:
                            _drive(root, server, side, endpoint, clients, seconds / 4)
                    server = servers[side, setting]
                    with server:
                        sample = _sample(root, server, side, endpoint, clients, seconds)
                    records.add("http sample", **fields, setting=setting.text, **sample)
            print(f"{endpoint.name} through HTTP, {clients} clients: {rounds} rounds", flush=True)


def _start(root: Path, side: str, endpoint: Endpoint, setting: Setting) -> Server:
    port = _free_port()
    log = root / "logs" / f"{side.replace(' ', '-')}-server.log"
    log.parent.mkdir(exist_ok=True)
    starter = _starter(endpoint)
    if side == "wattle":
        command = [
            str(python_of(root, "wattle")),
            "-m",
            "wattle",
            "serve",
            "--port",
            str(port),
            "--models",
            str(starter),
            # Small servers let in fewer by themselves; LitServe turns nobody away.
            "--max-concurrent-requests",
            str(max(CLIENTS)),
        ]
        ledger = Path(tempfile.mkdtemp(dir=root)) / "ledger.sqlite"
        return Server(command, port, log, {"WATTLE_LEDGER": str(ledger), "WATTLE_LOG_LEVEL": "warning"})
    numbers = map(str, (port, setting.workers, setting.threads, setting.batch, endpoint.max_tokens))
    command = [str(python_of(root, "http")), "-m", f"loadtests.peers.{LITSERVE[side]}", str(starter), *numbers]
    return Server(command, port, log, {"OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"})


def _sample(root: Path, server: Server, side: str, endpoint: Endpoint, clients: int, seconds: float) -> Record:
    meter, watch, started_s, cpu_s = Meter(), Watch(), time.monotonic(), server.cpu_s
    driven = _drive(root, server, side, endpoint, clients, seconds)
    elapsed_s = time.monotonic() - started_s
    server_s = server.cpu_s - cpu_s
    energy = meter.energy(server_s, elapsed_s, len(cores()))
    requests = driven["all_requests"]
    return {
        "per_s": driven["per_s"],
        "p50_s": driven["p50_s"],
        "p95_s": driven["p95_s"],
        "server_cpu_s": server_s / requests,
        "joules": energy.joules / requests,
        "quality": energy.quality,
        "foreign_cores": watch.foreign_cores(server_s + driven["client_cpu_s"], elapsed_s),
        "answers": driven["answers"],
    }


def _engine_sample(root: Path, endpoint: Endpoint, clients: int, seconds: float) -> Record:
    order = {
        "folder": str(_starter(endpoint)),
        "texts": endpoint.texts,
        "clients": clients,
        "seconds": seconds,
        "max_tokens": endpoint.max_tokens,
    }
    watch, started_s = Watch(), time.monotonic()
    command = [str(python_of(root, "wattle")), "-m", "loadtests.peers.engine_loop", json.dumps(order)]
    before_s = _children_cpu_s()
    driven: dict[str, Any] = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    elapsed_s, cpu_s = time.monotonic() - started_s, driven["cpu_s"]
    energy = Meter().energy(cpu_s, seconds, len(cores()))
    return {
        "setting": Setting(len(cores()), 1, 0).text,
        "per_s": driven["per_s"],
        "p50_s": driven["p50_s"],
        "p95_s": driven["p95_s"],
        "server_cpu_s": cpu_s / driven["all_requests"],
        "joules": energy.joules / driven["all_requests"],
        "quality": energy.quality,
        "foreign_cores": watch.foreign_cores(_children_cpu_s() - before_s, elapsed_s),
    }


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _starter(endpoint: Endpoint) -> Path:
    return ROOT / "models" / "starters" / endpoint.starter


def _drive(root: Path, server: Server, side: str, endpoint: Endpoint, clients: int, seconds: float) -> dict[str, Any]:
    path, parameters = (endpoint.wattle_path, endpoint.parameters) if side == "wattle" else ("/predict", {})
    url, bodies = server.url + path, [{"input": text, **parameters} for text in endpoint.texts]
    order = {"url": url, "bodies": bodies, "clients": clients, "seconds": seconds}
    done = subprocess.run(
        [str(python_of(root, "http")), "-m", "loadtests.peers.http_client", json.dumps(order)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise WorkerFailed(f"{side}, {clients} clients: {answer['error']}")
    said = endpoint.answer if side == "wattle" else lambda body: str(body["output"])
    answer["answers"] = {place: said(body) for place, body in answer["answers"].items()}
    return answer


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
