"""Keeps a run while it goes on: its clock, its requests, the meter, whether the target lives. Knows no Locust."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from loadtests.balance import Scrape
from loadtests.figures import Figures, by_task, figures, part
from loadtests.meter import MachineMeter, metered
from loadtests.plan import Plan
from loadtests.record import Observed, document
from loadtests.report import write_report
from loadtests.samples import Sample
from loadtests.target import Target

STRIKES = 3
"""So many times in a row, a second apart, a target must refuse a connection to count as dead."""
RECENT_S = 5.0
"""How far back the progress line looks."""


class Recorder:
    """One run at a time; ``begin`` starts the next. Not for several threads."""

    def __init__(self, plan: Plan, sleep: Callable[[float], None] = time.sleep) -> None:
        self.plan = plan
        self.scenario = plan.read_scenario()
        self.samples: list[Sample] = []
        self.history: list[dict[str, float | None]] = []
        """Mean joules per query over the last seconds, for the chart of the web interface."""
        self.running = False
        self.died_at_s: float | None = None
        self._sleep = sleep
        self._began_s = 0.0
        self._load_s: float | None = None
        self._meter: MachineMeter | None = None
        self._target: Target | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the run began; 0 before."""
        return time.monotonic() - self._began_s if self._began_s else 0.0

    @property
    def began_s(self) -> float:
        """Monotonic clock."""
        return self._began_s

    @property
    def loading(self) -> bool:
        """Whether requests are to be made."""
        return self.running and self._load_s is None

    def begin(self, address: str | None = None) -> None:
        """Open the account, just before the first request. Raises ``BadTarget``."""
        self._target = self.plan.open_target(address)
        self.samples = []
        self.history = []
        self.died_at_s = self._load_s = None
        self._strikes = 0
        self._power: list[tuple[float, float]] = []
        self._readings: list[tuple[float, float]] = []
        self._recent: deque[Sample] = deque()
        self._models = self._target.models()
        self._before = self._target.scrape()
        self._started_at = datetime.now(UTC).isoformat(timespec="seconds")
        if self._before is None:
            self._meter = MachineMeter(self._target.port)
            self._meter.watch_idle(self._sleep)
        self._began_unix_s = time.time()
        self._began_s = time.monotonic()
        self.running = True

    def add(self, sample: Sample) -> None:
        """A request is over."""
        self.samples.append(sample)
        self._recent.append(sample)

    def watch(self) -> None:
        """Read the meter and see whether the target lives; to be called every second of the run."""
        assert self._target is not None
        scrape = self._target.scrape() if self._before else None
        if scrape is not None:
            self._readings.append((self.elapsed_s, scrape.meter_j))
        now = self.recently()
        joules = {name: part(getattr(now, name), "mean") for name in ("active_j", "allocated_j")}
        self.history.append({"at_s": self.elapsed_s, **joules})
        alive = scrape is not None or self._target.is_alive()
        self._strikes = 0 if alive else self._strikes + 1
        if self._strikes == STRIKES and self.died_at_s is None:
            self.died_at_s = self.elapsed_s - (STRIKES - 1)

    def stop_load(self) -> None:
        """No further requests are made; those under way may end."""
        if self.loading:
            self._load_s = self.elapsed_s

    def finish(self, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Close the account: settle the bills, read the meter once more, write the report and return it."""
        assert self._target is not None
        self.stop_load()
        self.running = False
        ended_unix_s = time.time()
        target, readings = self._target, self._readings
        ended = target.scrape() if self._before else None
        target.settle(
            self.samples, self.plan.settle_s, lambda done, total: progress(f"{done} of {total} bills are settled")
        )
        after = self._await_assigned(ended, progress) if ended else None
        found, notes = None, []
        if self._meter is not None:
            self._meter.close()
            found = metered(self._meter.readings, self._began_unix_s, ended_unix_s)
            readings = [(each.at_s - self._began_unix_s, each.cpu_j + each.gpu_j) for each in self._meter.readings]
            if self._meter.failure:
                notes.append(f"This machine's meter: {self._meter.failure}.")
            self._meter = None
        made = document(
            Observed(
                plan=self.plan,
                target=target.base,
                started_at=self._started_at,
                load_s=self._load_s or 0.0,
                samples=self.samples,
                models=self._models,
                before=self._before,
                ended=ended,
                after=after,
                metered=found,
                power=_power(readings),
                died_at_s=self.died_at_s,
                notes=notes,
            )
        )
        write_report(made, Path(self.plan.out))
        return made

    def _await_assigned(self, ended: Scrape, progress: Callable[[str], None]) -> Scrape | None:
        """A scrape in which the server has assigned all that was metered until ``ended``, if it comes in time."""
        assert self._target is not None
        deadline_s = time.monotonic() + self.plan.settle_s
        while (after := self._target.scrape()) and after.settled_j < ended.meter_j and time.monotonic() < deadline_s:
            progress("waiting for the server to assign the energy of the run")
            self._sleep(0.5)
        return after

    def so_far(self) -> tuple[Figures, dict[str, Figures]]:
        """Figures of all requests until now, with the bills that came with the answers."""
        duration_s = max(self._load_s or self.elapsed_s, 1e-9)
        return figures(self.samples, duration_s), by_task(self.samples, duration_s)

    def recently(self) -> Figures:
        """Figures of the last seconds."""
        now_s = self.elapsed_s
        while self._recent and self._recent[0].at_s + self._recent[0].latency_ms / 1000 < now_s - RECENT_S:
            self._recent.popleft()
        return figures(list(self._recent), max(min(RECENT_S, now_s), 1e-9))

    def progress_line(self, users: int) -> str:
        """How far the run is and how it goes."""
        now, total = self.recently(), len(self.samples)
        failed = sum(sample.error is not None for sample in self.samples)
        load = f"{users} users" if self.scenario.rate is None else f"{self.scenario.level(self.elapsed_s):g}/s due"
        latency = "-" if now.latency_ms is None else f"{now.latency_ms.p95:.0f} ms"
        joules = "-" if now.allocated_j is None else f"{now.allocated_j.mean:.3g} J"
        return (
            f"{min(self.elapsed_s, self.scenario.duration_s):.0f}/{self.scenario.duration_s:.0f} s  {load}  "
            f"{now.requests_per_s:.1f} answers/s  p95 {latency}  {joules}/query  {total} sent, {failed} failed"
        )


class ProgressLine:
    """One line of a terminal written over and over; where there is no terminal, a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._width = 0
        self._next_s = 0.0

    def show(self, line: str) -> None:
        """Show ``line`` in place of the one before."""
        if self._terminal:
            print(f"\r{line.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        elif time.monotonic() >= self._next_s:
            print(line, file=sys.stderr, flush=True)
            self._next_s = time.monotonic() + 10

    def end(self) -> None:
        """Leave the line."""
        if self._terminal and self._width:
            print(file=sys.stderr, flush=True)
            self._width = 0


def describe_failure(status: int, body: bytes) -> str:
    """A short reason for a refusal, without what differs from request to request."""
    try:
        error = json.loads(body)["error"]
        message = error.get("code") or error.get("message") if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        message = body[:80].decode("utf-8", "replace")
    return f"{status}: {message}" if message else str(status)


def _power(readings: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean watts between every two readings, at the middle of them."""
    return [
        ((after_s + before_s) / 2, (after_j - before_j) / (after_s - before_s))
        for (before_s, before_j), (after_s, after_j) in pairwise(readings)
        if after_s > before_s
    ]
