"""What metering costs: one engine, asked the same with the meters on and off in turn. Knows nothing of HTTP.

    python -m service.metering_cost [MODEL [ROUNDS]]

MODEL is a folder under the starters, or a path. Off, nobody hears of steps and nothing reads a meter; on, the account
records every step, a thread reads the meters every 50 ms and settles, and every request is closed. Rounds of both
kinds follow each other, so that a machine which slows down slows both; figures are medians of the ratios of
neighbouring rounds. On a machine with other work on it, throughput says little, and CPU time some.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from energy.account import Account
from energy.ledger import Ledger
from energy.sampler import Sampler
from energy.types import RequestRecord, Step
from service.app import open_account
from service.engine.engine import Engine, engine_settings
from service.engine.types import EncodeItem, Item, Sampling, WriteItem
from service.models import Model, load_model
from service.settings import STARTERS, Settings, read_settings

ROUNDS = 10
ROUND_S = 2.0
_AT_ONCE = 32
_LENGTH = 20
_NS_PER_US = 1000


@dataclass(frozen=True, slots=True)
class Cost:
    """What one comparison showed."""

    throughput_lost: float
    """Median over pairs of rounds of 1 - requests on / requests off."""
    spread: tuple[float, float]
    """First and third quartile of the same."""
    cpu_added: float
    """Median over pairs of rounds of CPU time per request, on / off - 1."""
    record_us: float
    """Median time on the executor's thread per step."""
    record_p99_us: float
    close_us: float
    """Median time on the caller's thread per request."""
    steps: int
    sampler_cores: float
    """CPU time per time of the sampling thread while nothing was asked."""


class _Ear:
    """Hears of steps, and passes them on while metering is on."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self.listens = False
        self.taken_ns: list[int] = []

    def __call__(self, step: Step) -> None:
        if self.listens:
            started_ns = time.perf_counter_ns()
            self._account.record(step)
            self.taken_ns.append(time.perf_counter_ns() - started_ns)


def measure(model: Model, settings: Settings, rounds: int = ROUNDS, round_s: float = ROUND_S) -> Cost:
    """Compare ``rounds`` pairs of rounds of ``round_s`` seconds."""
    account = open_account(settings, {}, Ledger(settings.ledger))
    ear = _Ear(account)
    engine = Engine({model.name: model}, ear, engine_settings(settings))
    closed_ns: list[int] = []
    number = 0

    def ask(metered: bool) -> tuple[float, float]:
        """Requests per second, and CPU seconds per request, a batch after the other."""
        nonlocal number
        started_s, started_cpu_s, asked = time.monotonic(), time.process_time(), 0
        while time.monotonic() < started_s + round_s:
            items = [some_item(model, number + i) for i in range(_AT_ONCE)]
            number += len(items)
            for ticket in engine.submit(model.name, items):
                ticket.future.result()
            asked += len(items)
            if metered:
                for item in items:
                    begun_ns = time.perf_counter_ns()
                    account.close(RequestRecord(item.request_id, model.manifest.tasks[0], model.name, "ok"))
                    closed_ns.append(time.perf_counter_ns() - begun_ns)
        return asked / (time.monotonic() - started_s), (time.process_time() - started_cpu_s) / asked

    lost: list[float] = []
    added: list[float] = []
    try:
        ask(metered=False)
        for pair in range(rounds):
            speeds = {}
            costs_s = {}
            # Which comes first alternates: a machine that gets slower must not look like a cost.
            for metered in (pair % 2 == 0, pair % 2 == 1):
                ear.listens = metered
                with Sampler(account, settings.sample_interval_ms / 1000) if metered else nullcontext():
                    speeds[metered], costs_s[metered] = ask(metered)
            lost.append(1 - speeds[True] / speeds[False])
            added.append(costs_s[True] / costs_s[False] - 1)
        idle_cores = _idle(account, settings, round_s)
    finally:
        engine.close()
        account.shutdown()
    quartiles = quantiles(lost, n=4)
    return Cost(
        throughput_lost=median(lost),
        spread=(quartiles[0], quartiles[2]),
        cpu_added=median(added),
        record_us=median(ear.taken_ns) / _NS_PER_US,
        record_p99_us=quantiles(ear.taken_ns, n=100)[98] / _NS_PER_US,
        close_us=median(closed_ns) / _NS_PER_US,
        steps=len(ear.taken_ns),
        sampler_cores=idle_cores,
    )


def _idle(account: Account, settings: Settings, seconds: float) -> float:
    """CPU time per time of this process while it only meters: nearly all of it the sampling thread's."""
    with Sampler(account, settings.sample_interval_ms / 1000):
        time.sleep(1.0)  # what the load left behind is settled
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        time.sleep(seconds)
        return (time.process_time() - started_cpu_s) / (time.monotonic() - started_s)


def some_item(model: Model, number: int) -> Item:
    """A request for ``model``, of twenty tokens and as many to write; another for each number."""
    config = model.manifest.config
    ids = tuple(
        5 + (number * 31 + i * 7) % (config.vocab_size - 5) for i in range(min(_LENGTH, config.max_positions // 2))
    )
    if config.head == "lm":
        return WriteItem(f"r{number}", ids, Sampling(max_tokens=_LENGTH))
    return EncodeItem(f"r{number}", ids)


def main(arguments: Sequence[str]) -> int:
    """Print what metering costs."""
    name = arguments[0] if arguments else "translate-en-de"
    rounds = int(arguments[1]) if len(arguments) > 1 else ROUNDS
    folder = Path(name) if Path(name).is_dir() else STARTERS / name
    with TemporaryDirectory() as state:
        cost = measure(load_model(folder), read_settings(state=state), rounds)
    low, high = cost.spread
    print(
        f"{folder.name}, {_AT_ONCE} requests at once, {rounds} pairs of rounds of {ROUND_S:g} s, {cost.steps} steps\n"
        f"throughput lost: {cost.throughput_lost:.2%} (quartiles {low:.2%}, {high:.2%})\n"
        f"CPU time added: {cost.cpu_added:.2%}\n"
        f"on the executor's thread: {cost.record_us:.2f} us per step, 99th percentile {cost.record_p99_us:.2f}\n"
        f"on the caller's thread: {cost.close_us:.2f} us per request\n"
        f"while idle: {cost.sampler_cores:.3%} of a core"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
