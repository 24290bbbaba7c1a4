"""What metering costs: one service, asked the same with metering on and off in turn, without sockets.

    python -m service.metering_cost [MODEL [PAIRS]]

MODEL is a folder under the starters, or a path. *On* is the service as it is: every step is recorded, a thread reads
the meters and settles, every request is foretold, billed, logged, written to the ledger and entered in the books.
*Off* there is no account: steps are dropped, no meter is read, nothing is foretold, billed, logged or written. The
rest of the way is the same, from the body of a request to that of its answer, and so are the results, which are
compared.

A pair is a round of each kind with the same requests, so many at once, and a rest in which whatever is left over from
them gets settled and written. Rounds are short and many, so that a machine which changes its speed changes that of
both kinds. A figure is the mean over pairs without the outermost tenths, with a 95% interval by bootstrap. CPU time is
that of the whole process. It is also added up where metering spends it, which is more precise and does not see what
metering slows down elsewhere, nor the microseconds a step in which an executor adds up what fell to each job.
"""

import asyncio
import gc
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean, median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import uvloop
from fastapi import FastAPI

from energy.clock import NS_PER_S
from energy.host import Moment
from energy.types import Bill, Quality, RequestRecord
from service.app import create_app
from service.core import Service
from service.models import Model, load_model
from service.server import TURN_S
from service.settings import STARTERS, Settings, read_settings

PAIRS = 34
ROUND_S = 2.0
AIM = 0.01
"""Of CPU time and of throughput."""
_REST_S = 1.5
"""Bills are settled within a second, and then written."""
_AT_ONCE = 32
_NS_PER_US = 1000
_US_PER_S = 1_000_000
_CUT = 0.1
"""Of the pairs, at either end."""
_RESAMPLES = 2000
_TIMED = 5
"""Of what is done often, one of so many is timed: timing takes as long as some of it."""
_WORDS = 12
_TEXT = """A woman in a red coat walks her dog along the old river while two children play near a small wooden house
and three young men on bicycles look at the snow on the hills"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """What metering adds, as a share of what there is without it."""

    value: float
    """Mean over pairs, without the outermost tenths."""
    low: float
    high: float
    """Its 95% interval."""

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Share":
        """The share that these pairs show."""
        random = Random(0)
        means = sorted(_trimmed_mean(random.choices(shares, k=len(shares))) for _ in range(_RESAMPLES))
        tail = round(_RESAMPLES * 0.025)
        return cls(_trimmed_mean(shares), means[tail], means[-1 - tail])

    def __str__(self) -> str:
        """With a verdict."""
        verdict = "yes" if self.high < AIM else "no" if self.low > AIM else "not decided"
        return f"{self.value:.2%} (95% interval {self.low:.2%} to {self.high:.2%}); under {AIM:.0%}: {verdict}"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one comparison showed."""

    cpu: Share
    """CPU time per request: on / off - 1."""
    time: Share
    """Time per request, of which throughput is the inverse: on / off - 1."""
    cpu_off_us: float
    """CPU time per request without metering."""
    spent_us: Mapping[str, float]
    """CPU time per request by where metering spends it."""
    record_us: float
    """Median time on the executor's thread per step."""
    record_p99_us: float
    requests: int
    """With metering."""
    foreign_cores: float | None
    """Cores that other processes kept busy meanwhile."""


class _Watch:
    """How long something takes that is done often, and its CPU time; on any thread."""

    def __init__(self) -> None:
        self.times = 0
        self.elapsed_ns: list[int] = []
        self.cpu_ns: list[int] = []
        self.empty_ns: list[int] = []
        """CPU time of timing nothing at all, as often and in the same places."""

    @property
    def cpu_s(self) -> float:
        """CPU time of all of it, also what was not timed, without that of timing."""
        if not self.cpu_ns:
            return 0.0
        return (fmean(self.cpu_ns) - median(self.empty_ns)) * self.times / NS_PER_S

    def time(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do ``work``."""
        self.times += 1
        if self.times % _TIMED == 1:
            cpu_ns = time.thread_time_ns()
            self.empty_ns.append(time.thread_time_ns() - cpu_ns)
        if self.times % _TIMED:
            return work(*arguments)
        started_ns, cpu_ns = time.perf_counter_ns(), time.thread_time_ns()
        done = work(*arguments)
        self.cpu_ns.append(time.thread_time_ns() - cpu_ns)
        self.elapsed_ns.append(time.perf_counter_ns() - started_ns)
        return done


@dataclass(frozen=True, slots=True)
class _Round:
    elapsed_s: float
    """Until the last answer."""
    cpu_s: float
    """Until everything is settled and written."""
    results: Sequence[Any]


class _Rig:
    """A service in this process, and somebody who asks it."""

    def __init__(self, app: FastAPI, model: Model) -> None:
        self._app, self._model = app, model
        self._metered = True
        self._asked = 0
        service: Service = app.state.service
        account = service.account
        for name in ("wake", "read", "sample"):
            self._switch(account, name)
        self.recording = self._switch(account, "record")
        self._closing = self._switch(account, "close", _unknown)
        self._foretelling = self._switch(service.books.predictor, "begin")
        self._clocks = {
            thread.name: time.pthread_getcpuclockid(thread.ident)
            for thread in threading.enumerate()
            if thread.name in ("energy", "ledger") and thread.ident is not None
        }

    def _switch(self, owner: Any, name: str, instead: Callable[..., Any] = lambda *arguments: None) -> _Watch:
        """Watch a method of metering that is called only in rounds with metering."""
        watch, method = _Watch(), getattr(owner, name)

        def switched(*arguments: Any) -> Any:
            return watch.time(method, *arguments) if self._metered else instead(*arguments)

        setattr(owner, name, switched)
        return watch

    def spent_s(self) -> dict[str, float]:
        """CPU seconds of metering so far, by where they are spent."""
        return {
            "recording": self.recording.cpu_s,
            "closing": self._closing.cpu_s,
            "foretelling": self._foretelling.cpu_s,
            "settling": time.clock_gettime(self._clocks["energy"]),
            "ledger": time.clock_gettime(self._clocks["ledger"]),
        }

    async def pair(self, count: int, metered_first: bool) -> tuple[_Round, _Round]:
        """The same new requests with metering and without. Raises ``RuntimeError`` where the results differ."""
        self._asked += count
        bodies = [body_of(self._model, number) for number in range(self._asked - count, self._asked)]
        rounds = {on: await self.round(bodies, on) for on in (metered_first, not metered_first)}
        if rounds[True].results != rounds[False].results:
            raise RuntimeError("a request was answered otherwise with metering than without")
        return rounds[True], rounds[False]

    async def round(self, bodies: Sequence[bytes], metered: bool) -> _Round:
        """Ask for all of ``bodies``, so many at a time, and rest."""
        self._metered = metered
        waiting = iter(enumerate(bodies))
        results: dict[int, Any] = {}

        async def client() -> None:
            for number, body in waiting:
                results[number] = await ask(self._app, f"/v1/{self._model.manifest.tasks[0]}", body)

        started_s, started_cpu_s = time.monotonic(), time.process_time()
        await asyncio.gather(*(client() for _ in range(_AT_ONCE)))
        elapsed_s = time.monotonic() - started_s
        await asyncio.sleep(_REST_S)
        cpu_s = time.process_time() - started_cpu_s
        return _Round(elapsed_s, cpu_s, [results[number] for number in range(len(bodies))])


async def ask(app: FastAPI, path: str, body: bytes) -> Any:
    """The results that ``app`` answers to a POST. Raises ``RuntimeError`` for any status but 200."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    bodies = iter([{"type": "http.request", "body": body}])
    answer: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        message = next(bodies, None)
        # It stays until it is answered.
        return message or await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        answer.append(message)

    await app(scope, receive, send)
    whole = b"".join(message.get("body", b"") for message in answer)
    if answer[0]["status"] != 200:
        raise RuntimeError(f"status {answer[0]['status']}: {whole.decode()}")
    return json.loads(whole)["results"]


def body_of(model: Model, number: int) -> bytes:
    """A request for ``model`` about a dozen words; another for each number."""
    random = Random(number)
    text = " ".join(random.choices(_TEXT.split(), k=_WORDS)) + "."
    answers = model.manifest.tasks[0] == "answer"
    body = {"question": "Who walks?", "context": text} if answers else {"input": text, "truncate": True}
    return json.dumps(body).encode()


async def compare(model: Model, settings: Settings, pairs: int, round_s: float) -> Cost:
    """Compare ``pairs`` pairs of rounds of about ``round_s`` seconds."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        # As the server does.
        gc.freeze()
        rig = _Rig(app, model)
        # The first round is slow.
        for _ in range(2):
            warm, _ = await rig.pair(4 * _AT_ONCE, metered_first=True)
        count = max(_AT_ONCE, round(4 * _AT_ONCE * round_s / warm.elapsed_s))
        before, spent_s = Moment.now(), rig.spent_s()
        # Which comes first alternates: a machine that gets slower must not look like a cost.
        compared = [await rig.pair(count, metered_first=pair % 2 == 0) for pair in range(pairs)]
        foreign_cores = Moment.now().foreign_cores(before)
        spent_s = {where: now_s - spent_s[where] for where, now_s in rig.spent_s().items()}
        recorded_ns = rig.recording.elapsed_ns
    return Cost(
        cpu=Share.of([on.cpu_s / off.cpu_s - 1 for on, off in compared]),
        time=Share.of([on.elapsed_s / off.elapsed_s - 1 for on, off in compared]),
        cpu_off_us=median(off.cpu_s for _, off in compared) / count * _US_PER_S,
        spent_us={where: seconds / count / pairs * _US_PER_S for where, seconds in spent_s.items()},
        record_us=median(recorded_ns) / _NS_PER_US,
        record_p99_us=quantiles(recorded_ns, n=100)[98] / _NS_PER_US,
        requests=count * pairs,
        foreign_cores=foreign_cores,
    )


def _unknown(record: RequestRecord, *known: object) -> Bill:
    return Bill(record.request_id, None, None, None, Quality.UNAVAILABLE, settled=False)


def _trimmed_mean(values: Sequence[float]) -> float:
    cut = int(len(values) * _CUT)
    return fmean(sorted(values)[cut : len(values) - cut])


def _log_requests(file: Path) -> None:
    """Write the lines of requests as ``wattle serve`` does, to a file."""
    log = logging.getLogger("wattle.requests")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.FileHandler(file, encoding="utf-8"))


def main(arguments: Sequence[str]) -> int:
    """Print what metering costs."""
    name = arguments[0] if arguments else "translate-en-de"
    pairs = int(arguments[1]) if len(arguments) > 1 else PAIRS
    folder = Path(name) if Path(name).is_dir() else STARTERS / name
    sys.setswitchinterval(TURN_S)
    with TemporaryDirectory() as state:
        _log_requests(Path(state) / "requests.log")
        settings = read_settings(models=str(folder), state=state)
        cost = uvloop.run(compare(load_model(folder), settings, pairs, ROUND_S))
    spent_us = sum(cost.spent_us.values())
    where = ", ".join(f"{name} {each_us:.1f}" for name, each_us in cost.spent_us.items())
    print(
        f"{folder.name}, {_AT_ONCE} requests at once, {pairs} pairs of rounds of about {ROUND_S:g} s; "
        f"with metering {cost.requests} requests\n"
        f"foreign load: {'unknown' if cost.foreign_cores is None else f'{cost.foreign_cores:.2f} cores'}\n"
        f"CPU time added: {cost.cpu}\n"
        f"time added, of which throughput is the inverse: {cost.time}\n"
        f"CPU time of metering itself: {spent_us:.1f} us of {cost.cpu_off_us:.0f} us per request, "
        f"{spent_us / cost.cpu_off_us:.2%} ({where})\n"
        f"on the thread that ran a step: {cost.record_us:.2f} us, 99th percentile {cost.record_p99_us:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
