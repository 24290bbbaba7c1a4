"""What metering costs: one service, asked without a pause, with metering on and off in turn, without sockets.

    python -m service.metering_cost [MODEL ...] [--turns TURNS]

MODEL is a folder under the starters, or a path; of several, as of the five that are taken without any, one for each
task, each gets as many requests as the others. Texts are as long as those of the load tests. *Metered* is the service
as it is: every step is recorded, a thread reads the meters and settles, every request is foretold, billed, logged,
kept in the ledger and entered in the books. *Off* is the service with ``WATTLE_METER=none``: it logs requests and
keeps them in the ledger as well, with unknown bills, and that is all. *Bare* there is no account at all, neither log
nor ledger, and every answer bears the same bill. *Timed* it is metered and its parts are timed, which itself takes
more than they do. The rest of the way is the same, from the body of a request to that of its answer, and so are the
results, which are compared: what differs is counted. That is none, unless two words are all but equally likely to a
model: then the texts computed beside one decide.

A turn is a slice of each kind, so many requests always under way; the beginning of a slice, in which requests of the
one before end, is left out. Slices are longer where requests take long. From then on nothing stands between the
service and its metering, or what there is in its place. CPU time is told by thread, by the system's clock of each:

* an executor's in steps, over what steps of these shapes take on average (least squares over all steps of a model in a
  phase), so that how full batches happened to be does not look like a cost;
* an executor's between steps, per step;
* the event loop's, with whoever asks, per request;
* that of the threads that settle and that write the ledger, all of it over all requests of their account.

Throughput is told twice: by the work that was done in the time, and by the CPU time that was left for steps. The
second knows no change of the machine's speed, and shows where threads wait for the interpreter. It does not see
whether steps themselves take longer with metering; the CPU time of executors in steps does.

A figure is the mean over turns without the outermost tenths, with a 95% interval by bootstrap. Metering is also added
up where it is spent, which is more precise and does not see what it slows down elsewhere. Neither way sees that a step
writes down the work in it, which `/metrics` needs as well; and a step asks for its CPU time without a meter, too, so
that only adding up sees what that takes.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import cycle, permutations
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import uvloop
from fastapi import FastAPI

from energy.account import Account
from energy.clock import NS_PER_S
from energy.host import Moment
from energy.ledger import Ledger
from energy.sampler import Sampler
from energy.types import NOTHING_BESIDE, UNSHARED, Beside, Bill, Bills, Phase, Quality, Step
from service.app import create_app, open_account
from service.books import Books
from service.core import Charge, Service
from service.engine import executor
from service.metrics import Metrics
from service.models import Model, load_model
from service.server import TURN_S, calm_collector
from service.settings import STARTERS, Settings, read_settings

TURNS = 24
SLICE_S = 1.0
"""At least."""
AIM = 0.01
"""Of CPU time and of throughput."""
_LEFT_OUT_S = 0.5
"""Before a slice, at least: longer than a request takes."""
_REQUESTS_LONG = 4
"""How often the longest request could be done in a slice."""
_REST_S = 1.5
"""Bills are settled within a second, and then written."""
_AT_ONCE = 32
_NS_PER_US = 1000
_CUT = 0.1
"""Of the turns, at either end."""
_TICKS = 0.02
"""Of what is timed, the largest, which are left out."""
_RESAMPLES = 2000
_STRIDE = 7
"""Through the orders of kinds: of any four in a row each begins with another, and all come."""
_TEXTS = 64
"""For each model; so few that all are soon known: else a kind of slice that comes first would keep the results for the
others."""
_TIMED = 5
"""Of what is done often, one of so many is timed: timing takes as long as some of it."""
_WORDS = {"translate": 8, "generate": 32, "answer": 132, "sentiment": 19, "summarize": 115}
"""Of a text, by task: the means of public data sets (``loadtests/texts/lengths.toml``)."""
_TOKENS = 32
"""That are written behind a prompt."""
_TEXT = """A woman in a red coat walks her dog along the old river while two children play near a small wooden house
and three young men on bicycles look at the snow on the hills"""
_PURPOSES = {
    "measuring": ("clocks", "reading", "pacing"),
    "apportioning": ("sharing", "telling", "recording", "waking", "closing", "settling"),
    "keeping": ("writing", "publishing", "ledger"),
    "foretelling": ("foretelling",),
}
_ON_STEPS = ("clocks", "sharing", "telling", "recording")
"""On the threads of executors."""
_ON_LOOP = ("pacing", "waking", "closing", "writing", "foretelling")
"""On the event loop."""
_BESIDE = ("reading", "settling", "publishing", "ledger")
"""On threads of its own."""
_BILL = Bill("", 23_456, 34_567, 0.004567, Quality.ESTIMATED, settled=False)
_ENDED = ("", "", "", "ok", 0, 0, 0.0, 0.0, None)
_OFF = Beside({}, 0)
"""Of requests that began without a meter: nothing, as of those without any account, but told apart."""
_UNTIMED_OFF, _UNTIMED_BARE = dict.fromkeys(Phase, _OFF), dict.fromkeys(Phase, NOTHING_BESIDE)
T = TypeVar("T")


class Kind(StrEnum):
    """Of a slice."""

    METERED = "metered"
    OFF = "off"
    BARE = "bare"
    TIMED = "timed"


@dataclass(frozen=True, slots=True)
class Share:
    """What one kind of slice adds to another, as a share of that or in microseconds a request."""

    value: float
    """Mean over turns, without the outermost tenths."""
    low: float
    high: float
    """Its 95% interval."""

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Share":
        """What these turns show."""
        random = Random(0)
        means = sorted(_trimmed_mean(random.choices(shares, k=len(shares))) for _ in range(_RESAMPLES))
        tail = round(_RESAMPLES * 0.025)
        return cls(_trimmed_mean(shares), means[tail], means[-1 - tail])

    def __str__(self) -> str:
        """With a verdict."""
        verdict = "yes" if self.high < AIM else "no" if self.low > AIM else "not decided"
        return f"{self.value:.2%} (95% interval {self.low:.2%} to {self.high:.2%}); under {AIM:.0%}: {verdict}"


@dataclass(frozen=True, slots=True)
class Against:
    """What metering adds to a service without; microseconds are of CPU time and per request."""

    cpu: Share
    """CPU time: metered / without - 1."""
    time: Share
    """Time for the same work, of which throughput is the inverse: metered / without - 1."""
    added_us: Mapping[str, Share]
    """CPU time: metered - without, by thread."""
    room: Share
    """CPU time that was left for steps: without / metered - 1. Told more sharply than ``time``, in which every change
    of the machine's speed is; it takes steps to be as long with metering as without."""
    busy_cores: Share
    """Cores that the process kept busy: metered - without. Where fewer, threads waited for the interpreter."""
    without_us: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one comparison showed; microseconds are of CPU time and per request."""

    against_off: Against
    against_bare: Against
    spent_us: Mapping[str, float]
    """Metering itself, by what is done."""
    kept_us: float
    """What keeping requests takes without a meter, but for what the event loop does for it."""
    steps: float
    """A request, of which each has many."""
    requests: int
    """Metered ones."""
    otherwise: int
    """Answers of any kind of slice that were not as the first to the same request."""
    slice_s: float
    foreign_cores: float | None
    """Cores that other processes kept busy meanwhile."""


class _Watch:
    """How much CPU time something takes that is done often; on any thread."""

    def __init__(self) -> None:
        self.times = 0
        """However many of them were timed."""
        self.cpu_ns: list[int] = []
        self.empty_ns: list[int] = []
        """Of timing nothing at all, as often and in the same places."""
        self.clock_ns: list[int] = []
        """Of asking for the time where nobody had just done so, likewise."""

    @property
    def total_ns(self) -> float:
        """Of all of it, also what was not timed, without that of timing."""
        return (_usual(self.cpu_ns) - _usual(self.empty_ns)) * self.times if self.cpu_ns else 0.0

    @property
    def timing_ns(self) -> float:
        """What timing would have taken every time: asking twice."""
        return 2 * _usual(self.clock_ns) * self.times if self.cpu_ns else 0.0

    def time(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do ``work``."""
        first_ns = time.thread_time_ns()
        before_ns = time.thread_time_ns()
        began_ns = time.thread_time_ns()
        done = work(*arguments)
        self.cpu_ns.append(time.thread_time_ns() - began_ns)
        # The first time the clock itself has to come back into the caches: that is not to be taken off.
        self.empty_ns.append(began_ns - before_ns)
        self.clock_ns.append(before_ns - first_ns)
        return done


@dataclass(slots=True)
class _Slice:
    kind: Kind
    requests: int = 0
    steps: defaultdict[str, list[tuple[Step, int]]] = field(default_factory=lambda: defaultdict(list))
    """By executor, with the CPU time of its thread after each."""
    elapsed_s: float = 0.0
    loop_ns: int = 0
    """CPU time of the event loop."""
    process_ns: int = 0
    """That of the whole process."""

    @property
    def whole_steps(self) -> list[Step]:
        """All but the first of each executor, which may have begun before."""
        return [step for steps in self.steps.values() for step, _ in steps[1:]]

    @property
    def step_cores(self) -> float:
        """Cores that these steps kept busy."""
        return sum(step.cpu_ns for step in self.whole_steps) / NS_PER_S / self.elapsed_s

    @property
    def busy_cores(self) -> float:
        """Cores that the whole process did."""
        return self.process_ns / NS_PER_S / self.elapsed_s

    @property
    def between_ns(self) -> int:
        """CPU time that executors took between these steps."""
        whole_ns = sum(steps[-1][1] - steps[0][1] for steps in self.steps.values() if steps)
        return whole_ns - sum(step.cpu_ns for step in self.whole_steps)


@dataclass(frozen=True, slots=True)
class _Part:
    """A function of metering, and what else stands in its place."""

    owner: Any
    name: str
    metered: Callable[..., Any]
    off: Callable[..., Any]
    bare: Callable[..., Any]
    kind_of: Callable[..., Kind]
    """Of which kind a call is where there are calls of several: between two slices."""
    watch: _Watch = field(default_factory=_Watch)

    def put(self, kind: Kind | None) -> None:
        """Have it as slices of a kind have it; None is between two."""
        places = {Kind.METERED: self.metered, Kind.OFF: self.off, Kind.BARE: self.bare}

        # Plain functions, for on a class they are given the instance.
        def decided(*arguments: Any) -> Any:
            return places.get(self.kind_of(*arguments), self.metered)(*arguments)

        def timed(*arguments: Any) -> Any:
            self.watch.times += 1
            is_timed = self.watch.times % _TIMED == 0
            return self.watch.time(self.metered, *arguments) if is_timed else self.metered(*arguments)

        setattr(self.owner, self.name, decided if kind is None else places.get(kind, timed))


@dataclass(frozen=True, slots=True)
class _Spent:
    """CPU time of metering, and over how many requests."""

    metered: int
    """Those that were metered and are settled."""
    off: int
    """Those that are settled in the account without a meter."""
    watched: int
    """Those whose parts were timed."""
    spent_ns: Mapping[str, float]
    """By what is done."""
    kept_ns: int
    """Of the threads of the account without a meter."""

    def since(self, earlier: "_Spent") -> "_Spent":
        """From then on."""
        spent_ns = {what: ns - earlier.spent_ns[what] for what, ns in self.spent_ns.items()}
        return _Spent(
            self.metered - earlier.metered,
            self.off - earlier.off,
            self.watched - earlier.watched,
            spent_ns,
            self.kept_ns - earlier.kept_ns,
        )

    @property
    def us(self) -> dict[str, float]:
        """Of a request, by what is done."""
        return {
            what: ns / (self.metered if what in _BESIDE else self.watched) / _NS_PER_US
            for what, ns in self.spent_ns.items()
        }

    @property
    def kept_us(self) -> float:
        """Of a request without a meter."""
        return self.kept_ns / self.off / _NS_PER_US


def _nothing(*arguments: Any) -> None:
    """What stands in the place of what is not done."""


class _Rig:
    """A service in this process, and those who ask it."""

    def __init__(
        self, app: FastAPI, models: Sequence[Model], off: Account, threads: Mapping[Kind, Sequence[Thread]]
    ) -> None:
        """``off`` is an account without a meter; ``threads`` settle and write the ledgers of each."""
        self._app, self._models = app, models
        self._kind = Kind.METERED
        self._slice = _Slice(self._kind)
        self._numbers = {kind: cycle(range(_TEXTS * len(models))) for kind in Kind}
        self._results: dict[int, Any] = {}
        self._slice_s, self._left_out_s = SLICE_S, _LEFT_OUT_S
        self._longest_s = 0.0
        """That a request took, or had taken when nobody waited for it any longer."""
        self.otherwise = 0
        """Answers that were not as the first one to the same request."""
        self._settled = dict.fromkeys((Kind.METERED, Kind.OFF), 0)
        """Requests, by whose account they are in."""
        self._unwatched: list[tuple[Any, str, Any]] = []
        """What was there before it was watched."""
        service: Service = app.state.service
        self._books, account, predictor = service.books, service.account, service.books.predictor
        self._parts = {
            "waking": self._part(account, "wake", off=off.wake),
            "pacing": self._part(
                service.pace, "begin", off=lambda *about: _UNTIMED_OFF, bare=lambda *about: _UNTIMED_BARE
            ),
            "writing": self._part(
                Charge, "ended", off=Charge.ended, bare=lambda *about: _ENDED, kind_of=self._kind_of_charge
            ),
            "sharing": self._part(executor, "share_load", off=lambda *about: UNSHARED, bare=lambda *about: UNSHARED),
            "telling": self._part(executor, "_tell", off=executor._tell),
            "recording": self._part(account, "record", off=off.record),
            "closing": self._part(
                account, "close", off=off.close, bare=lambda *about: _BILL, kind_of=self._kind_of_end
            ),
            "foretelling": self._part(predictor, "begin"),
        }
        self._pauses = [self._part(account, name) for name in ("read", "sample")]
        """Those that are not told of, as what they do is."""
        for name in ("read", "sample"):
            function = self._watched(off, name)
            self._pauses.append(_Part(off, name, _nothing, function, _nothing, self._kind_now))
        self._rare = {"reading": self._always(account, "_read"), "publishing": self._always(account, "_publish")}
        for kind, each in ((Kind.METERED, account), (Kind.OFF, off)):
            self._watched(each, "_on_settled")
            each._on_settled = partial(self._enter, kind)
        self._keep_steps(service.metrics)
        self._clocks = {
            kind: {thread.name: time.pthread_getcpuclockid(thread.ident) for thread in own if thread.ident is not None}
            for kind, own in threads.items()
        }

    def _part(
        self,
        owner: Any,
        name: str,
        *,
        off: Callable[..., Any] = _nothing,
        bare: Callable[..., Any] = _nothing,
        kind_of: Callable[..., Kind] | None = None,
    ) -> _Part:
        return _Part(owner, name, self._watched(owner, name), off, bare, kind_of or self._kind_now)

    def _watched(self, owner: Any, name: str) -> Any:
        function = getattr(owner, name)
        self._unwatched.append((owner, name, function))
        return function

    def _always(self, owner: Any, name: str) -> _Watch:
        """Time a function that is seldom called each time that it is."""
        watch, function = _Watch(), self._watched(owner, name)

        def timed(*arguments: Any) -> Any:
            watch.times += 1
            return watch.time(function, *arguments)

        setattr(owner, name, timed)
        return watch

    def close(self) -> None:
        """Leave everything as it was."""
        for owner, name, function in reversed(self._unwatched):
            setattr(owner, name, function)

    def _put(self, kind: Kind | None) -> None:
        for part in (*self._parts.values(), *self._pauses):
            part.put(kind)

    def _kind_now(self, *about: object) -> Kind:
        return self._kind

    def _kind_of_charge(self, charge: Charge, *about: object) -> Kind:
        return self._kind_of_end((), charge.beside)

    def _kind_of_end(self, ended: object, beside: Beside, *loads: object) -> Kind:
        """That which a request was of when it began, which all of these do with a short piece."""
        return {id(_OFF): Kind.OFF, id(NOTHING_BESIDE): Kind.BARE}.get(id(beside), Kind.METERED)

    def _enter(self, kind: Kind, bills: Sequence[Bills]) -> None:
        self._settled[kind] += sum(map(len, bills))
        self._books.settled(bills)

    def _keep_steps(self, metrics: Metrics) -> None:
        counted = metrics.step

        def kept(step: Step) -> None:
            if step.work is not None:
                self._slice.steps[step.device].append((step, time.thread_time_ns()))
            counted(step)

        metrics.step = kept  # type: ignore[method-assign]

    def spent(self) -> "_Spent":
        """CPU time of metering so far."""
        watches = {name: part.watch for name, part in self._parts.items()}
        spent_ns = {name: watch.total_ns for name, watch in (watches | self._rare).items()}
        by_thread_ns = {
            kind: {name: time.clock_gettime_ns(clock) for name, clock in own.items()}
            for kind, own in self._clocks.items()
        }
        # A step asks for its CPU time twice, as a watch does.
        spent_ns["clocks"] = watches["recording"].timing_ns
        metered_ns = by_thread_ns[Kind.METERED]
        spent_ns["settling"] = metered_ns["energy"] - spent_ns["reading"] - spent_ns["publishing"]
        spent_ns["ledger"] = metered_ns["ledger"]
        kept_ns = sum(by_thread_ns[Kind.OFF].values())
        return _Spent(
            self._settled[Kind.METERED], self._settled[Kind.OFF], watches["closing"].times, spent_ns, kept_ns
        )

    def lengthen(self) -> None:
        """From now on slices are long enough for requests that take as long as the longest so far."""
        self._left_out_s = max(_LEFT_OUT_S, self._longest_s)
        self._slice_s = max(SLICE_S, _REQUESTS_LONG * self._longest_s)

    async def compare(self, turns: int) -> list[list[_Slice]]:
        """Ask without a pause, and keep ``turns`` turns of slices. Raises ``RuntimeError`` where one fails."""
        clients = [asyncio.create_task(self._ask_on()) for _ in range(_AT_ONCE)]
        # Which comes first changes: a machine that gets slower must not look like a cost.
        orders = list(permutations(Kind))
        kept = [
            [await self._keep_slice(kind) for kind in orders[_STRIDE * turn % len(orders)]] for turn in range(turns)
        ]
        for client in clients:
            client.cancel()
        for outcome in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        # What was metered last is still to be settled; what was not is settled with the next slice of its kind.
        self._kind = Kind.TIMED
        self._put(None)
        await asyncio.sleep(_REST_S)
        return kept

    async def _keep_slice(self, kind: Kind) -> _Slice:
        self._kind = kind
        self._put(None)
        await asyncio.sleep(self._left_out_s)
        self._put(kind)
        kept = self._slice = _Slice(kind)
        started_s, loop_ns, process_ns = time.monotonic(), time.thread_time_ns(), time.process_time_ns()
        await asyncio.sleep(self._slice_s)
        kept.elapsed_s, kept.loop_ns = time.monotonic() - started_s, time.thread_time_ns() - loop_ns
        kept.process_ns = time.process_time_ns() - process_ns
        self._slice = _Slice(kind)
        return kept

    async def _ask_on(self) -> None:
        while True:
            number = next(self._numbers[self._kind])
            model = self._models[number % len(self._models)]
            path, body, began_s = f"/v1/{model.manifest.tasks[0]}", body_of(model, number), time.monotonic()
            try:
                results = await ask(self._app, path, body)
            finally:
                self._longest_s = max(self._longest_s, time.monotonic() - began_s)
            self._slice.requests += 1
            self.otherwise += self._results.setdefault(number, results) != results


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
    """A request for ``model``; another for each number."""
    random, task = Random(number), model.manifest.tasks[0]
    text = " ".join(random.choices(_TEXT.split(), k=_WORDS[task])) + "."
    body: dict[str, object] = {"input": text, "truncate": True}
    if task == "answer":
        body = {"question": "Who walks?", "context": text}
    elif task == "generate":
        # A chat's answer is soon over, and so is what is written behind a full stop.
        body = {"input": f"{text} He said:", "chat": False, "max_tokens": _TOKENS, "temperature": 0}
    return json.dumps(body).encode()


async def compare(models: Sequence[Model], settings: Settings, turns: int) -> Cost:
    """Compare ``turns`` turns of slices."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        # As the server does.
        calm_collector()
        threads = _accountants()
        with without_meter(settings, app.state.service.books) as off:
            both = {Kind.METERED: threads, Kind.OFF: [each for each in _accountants() if each not in threads]}
            with closing(_Rig(app, models, off, both)) as rig:
                # The first requests are slow.
                await rig.compare(1)
                rig.lengthen()
                before, spent = Moment.now(), rig.spent()
                slices = await rig.compare(turns)
                foreign_cores = Moment.now().foreign_cores(before)
                spent = rig.spent().since(spent)
    return _cost(slices, spent, rig.otherwise, foreign_cores)


def _accountants() -> list[Thread]:
    """The threads that settle and that write ledgers."""
    return [thread for thread in threading.enumerate() if thread.name in ("energy", "ledger")]


@contextmanager
def without_meter(settings: Settings, books: Books) -> Iterator[Account]:
    """A second account as the service opens it with ``WATTLE_METER=none``, with a ledger of its own."""
    ledger = Ledger(settings.state / "off.sqlite", settings.ledger_max_days, settings.ledger_max_mb)
    account = open_account(settings.model_copy(update={"meter": "none"}), ledger, books.settled)
    try:
        with Sampler(account, settings.sample_interval_ms / 1000):
            yield account
    finally:
        account.shutdown()


def _cost(turns: Sequence[Sequence[_Slice]], spent: _Spent, otherwise: int, foreign_cores: float | None) -> Cost:
    """What the slices of ``turns`` show."""
    every = [each for turn in turns for each in turn]
    usual_ns = _usual_ns([step for each in every for step in each.whole_steps])
    in_slices = sum(each.requests for each in every)
    steps_us = sum(step.cpu_ns for each in every for step in each.whole_steps) / in_slices / _NS_PER_US
    steps = sum(len(each.whole_steps) for each in every) / in_slices
    beside_us = {Kind.METERED: sum(spent.us[what] for what in _BESIDE), Kind.OFF: spent.kept_us}
    took: list[dict[Kind, dict[str, float]]] = []
    rates: list[dict[Kind, float]] = []
    for turn in turns:
        usual = {each.kind: sum(usual_ns[id(step)] for step in each.whole_steps) for each in turn}
        rates.append({each.kind: usual[each.kind] / each.elapsed_s for each in turn})
        took.append(
            {
                each.kind: {
                    "executors in steps": sum(step.cpu_ns for step in each.whole_steps) / usual[each.kind] * steps_us,
                    "executors between steps": each.between_ns / len(each.whole_steps) * steps / _NS_PER_US,
                    "event loop": each.loop_ns / each.requests / _NS_PER_US,
                    "settling and ledger": beside_us.get(each.kind, 0.0),
                }
                for each in turn
            }
        )
    by_kind = [{each.kind: each for each in turn} for turn in turns]

    def against(kind: Kind) -> Against:
        on, threads = Kind.METERED, took[0][kind]
        return Against(
            cpu=Share.of([sum(each[on].values()) / sum(each[kind].values()) - 1 for each in took]),
            time=Share.of([rate[kind] / rate[on] - 1 for rate in rates]),
            added_us={name: Share.of([each[on][name] - each[kind][name] for each in took]) for name in threads},
            room=Share.of([each[kind].step_cores / each[on].step_cores - 1 for each in by_kind]),
            busy_cores=Share.of([each[on].busy_cores - each[kind].busy_cores for each in by_kind]),
            without_us=fmean(sum(each[kind].values()) for each in took),
        )

    return Cost(
        against_off=against(Kind.OFF),
        against_bare=against(Kind.BARE),
        spent_us=spent.us,
        kept_us=spent.kept_us,
        steps=steps,
        requests=spent.metered,
        otherwise=otherwise,
        slice_s=fmean(each.elapsed_s for each in every),
        foreign_cores=foreign_cores,
    )


def _usual_ns(steps: Sequence[Step]) -> dict[int, float]:
    """By the identity of each of ``steps``, CPU time that steps of its shape take: a line through all of its model and
    phase."""
    usual_ns: dict[int, float] = {}
    by_kind: defaultdict[tuple[str, Phase], list[Step]] = defaultdict(list)
    for step in steps:
        if step.work is not None:
            by_kind[step.model, step.work.phase].append(step)
    for alike in by_kind.values():
        shapes = np.array([_shape(step) for step in alike], float)
        line = np.linalg.lstsq(shapes, np.array([step.cpu_ns for step in alike], float), rcond=None)[0]
        usual_ns |= {id(step): float(ns) for step, ns in zip(alike, shapes @ line, strict=True)}
    return usual_ns


def _shape(step: Step) -> tuple[int, int, int, int]:
    rows = len(step.work.request_ids) if step.work else 0
    return step.passes, step.passes * rows, step.tokens_with_padding, step.context_tokens


def _usual(values: Sequence[int]) -> float:
    """The mean without the largest: what the system does in its ticks is not spent by whoever is interrupted."""
    return fmean(sorted(values)[: round(len(values) * (1 - _TICKS)) or 1])


def _trimmed_mean(values: Sequence[float]) -> float:
    cut = int(len(values) * _CUT)
    return fmean(sorted(values)[cut : len(values) - cut])


def _log_requests(file: Path) -> None:
    """Write the lines of requests as ``wattle serve`` does, to a file."""
    log = logging.getLogger("wattle.requests")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(logging.FileHandler(file, encoding="utf-8"))


def _told(cost: Cost) -> Iterator[str]:
    """The figures of ``cost``, line by line."""
    yield f"with metering {cost.requests} requests; {cost.steps:.2f} steps each; answered otherwise {cost.otherwise}"
    yield f"foreign load: {'unknown' if cost.foreign_cores is None else f'{cost.foreign_cores:.2f} cores'}"
    spent_us = sum(cost.spent_us.values())
    yield f"CPU time of metering itself: {spent_us:.1f} us per request"
    for purpose, whats in _PURPOSES.items():
        figures = ", ".join(f"{what} {cost.spent_us[what]:.1f}" for what in whats)
        yield f"  {purpose} {sum(cost.spent_us[what] for what in whats):.1f} us ({figures})"
    on_step_us = sum(cost.spent_us[what] for what in _ON_STEPS) / cost.steps
    yield f"  on the thread that ran a step {on_step_us:.1f} us a step"
    yield f"  on the event loop {sum(cost.spent_us[what] for what in _ON_LOOP):.1f} us per request"
    kept_us = cost.kept_us + cost.spent_us["writing"]
    yield from _told_against("off, with WATTLE_METER=none", cost.against_off, spent_us - kept_us, kept_us)
    yield from _told_against("bare, without any account", cost.against_bare, spent_us, 0)


def _told_against(name: str, against: Against, added_us: float, kept_us: float) -> Iterator[str]:
    yield f"{name}: {against.without_us:.0f} us of CPU time per request, {kept_us:.1f} of them to keep it"
    yield f"  metering adds, by adding up, {added_us:.1f} us, {added_us / against.without_us:.2%}"
    yield f"  CPU time added: {against.cpu}"
    for thread, share in against.added_us.items():
        yield f"    {thread} {share.value:+.1f} us per request (95% interval {share.low:+.1f} to {share.high:+.1f})"
    yield f"  time added, of which throughput is the inverse: {against.time}"
    yield f"    by what is left for steps alone: {against.room}"
    busy = against.busy_cores
    yield f"    cores kept busy {busy.value:+.3f} (95% interval {busy.low:+.3f} to {busy.high:+.3f})"


def one_for_each_task(models: Iterable[Model]) -> list[Model]:
    """The first of ``models`` for each first task."""
    by_task: dict[str, Model] = {}
    for model in models:
        by_task.setdefault(model.manifest.tasks[0], model)
    return list(by_task.values())


def main(arguments: Sequence[str]) -> int:
    """Print what metering costs."""
    parser = argparse.ArgumentParser(prog="python -m service.metering_cost", description="What metering costs.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a starter's name, or a folder; one for each task")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each kind of slice comes (%(default)s)")
    asked = parser.parse_args(arguments)
    named = [Path(name) if Path(name).is_dir() else STARTERS / name for name in asked.models]
    folders = named or sorted(manifest.parent for manifest in STARTERS.glob("*/manifest.json"))
    # Of one task the service would ask the first alone.
    models = one_for_each_task(map(load_model, folders))
    sys.setswitchinterval(TURN_S)
    with TemporaryDirectory() as state:
        _log_requests(Path(state) / "requests.log")
        settings = read_settings(models=os.pathsep.join(str(model.folder) for model in models), state=state)
        cost = uvloop.run(compare(models, settings, asked.turns))
    names = ", ".join(model.manifest.name for model in models)
    print(f"{names}, {_AT_ONCE} requests at once, {asked.turns} turns of slices of {cost.slice_s:.1f} s")
    print("\n".join(_told(cost)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
