"""What is billed and what is not sums to the meter, whatever happens; and the check catches wrong ways to bill."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy import account as account_module
from energy.account import Account
from energy.balances import Charged
from energy.carbon import Carbon
from energy.host import Neighbours
from energy.requests import Noted, Requests
from energy.settlement import HORIZON_NS, Channel, Claim
from energy.types import Phase, RequestRecord, Step, Work
from tests.energy.fakes import MS, Book, CountingMeter, HeldClock, step_of

EXECUTORS = ("cpu:0", "cpu:1", "gpu:0", "cpu")
PHASES = (Phase.ENCODE, Phase.PREFILL, Phase.DECODE)


class World:
    """A machine with two executors on its processor and one on its GPU, on which things happen at random."""

    def __init__(self, seed: int, resolution_ms: int = 1) -> None:
        self.random = Random(seed)
        self.held = HeldClock()
        self.meter = CountingMeter(self.held, {"cpu": 0, "dram": 0, "gpu:0": 0}, resolution_ms * MS)
        self.book = Book()
        self.account = Account(
            self.meter,
            Carbon(),
            self.book,
            executors=3,
            idle_uw={"cpu": 3_000_000, "dram": 1_000_000, "gpu:0": 20_000_000},
            neighbours=Neighbours(Path("/nonexistent")),
            clock=self.held.clock,
        )
        self.open: list[str] = []
        self.requests = 0

    def pass_time(self, ms: int, cpu_ms: int = 0) -> None:
        self.held.run(ms, cpu_ms)
        for device, most_uj_per_ms in (("cpu", 20_000), ("dram", 3000), ("gpu:0", 300_000)):
            self.meter.energy_uj[device] += self.random.randint(0, most_uj_per_ms * ms)

    def step(self, ms: int, cpu_ms: int, device: str | None = None) -> Step:
        """A step that ends now, of some open requests and some new ones; at times of none."""
        new = [f"r{self.requests + i}" for i in range(self.random.randint(0, 3))]
        self.requests += len(new)
        self.open += new
        names = new + self.random.sample(self.open, self.random.randint(0, min(5, len(self.open))))
        work = Work(
            self.random.choice(PHASES),
            names,
            [self.random.randint(0, 50) for _ in names],
            [self.random.randint(0, 500) for _ in names],
        )
        now_ns = self.held.now_ns
        device = device or self.random.choice(EXECUTORS)
        return step_of(work if names else None, now_ns - ms * MS, now_ns, cpu_ms * MS, device)

    def close(self, request_id: str) -> None:
        self.open.remove(request_id)
        status = self.random.choice(["ok", "cancelled", "failed"])
        self.account.close(RequestRecord(request_id, self.random.choice(["translate", "generate"]), "tiny", status))

    def happen(self) -> None:
        match self.random.randint(0, 5):
            case 0:
                self.pass_time(self.random.choice([1, 30, 700]))
            case 1 | 2:
                ms = self.random.randint(1, 60)
                cpu_ms = self.random.randint(0, ms)
                self.pass_time(ms, cpu_ms)
                self.account.record(self.step(ms, cpu_ms))
            case 3:
                self.account.sample()
            case 4 if self.open:
                self.close(self.random.choice(self.open))
            case 5:
                self.meter.broken = self.random.random() < 0.1

    def end(self) -> None:
        """Close what is open, and let everything that waits expire."""
        self.meter.broken = False
        for request_id in list(self.open):
            self.close(request_id)
        for _ in range(2):
            self.account.sample()
            self.held.run(HORIZON_NS // MS + 1)
        self.account.sample()

    def check(self) -> None:
        """The proof: raises ``AssertionError`` where the books and the meter differ by a microjoule."""
        totals = self.account.totals()
        settled: Counter[str] = Counter()
        for row in (*totals.attributed, *totals.unattributed):
            assert row.energy_uj >= 0
            settled[row.device] += row.energy_uj
        for total in totals.meters:
            assert total.settled_uj == settled[total.device]
            assert total.open_uj >= 0
            assert total.residual_uj == 0, f"{total.device}: {total.residual_uj} uJ are on no account"

    def check_end(self) -> None:
        """At the end every microjoule is on a bill or unattributed, and the bills are what was attributed."""
        self.check()
        totals = self.account.totals()
        for total in totals.meters:
            assert (total.open_uj, total.settled_uj) == (0, self.meter.energy_uj[total.device])
        by_task: Counter[tuple[str, str, str]] = Counter()
        for row in totals.attributed:
            by_task[row.task, row.device, row.phase] += row.energy_uj
        for record in self.book.records.values():
            by_task.subtract({(record.request.task, device, phase): uj for device, phase, uj in record.bill.parts})
        bills = [record.bill for record in self.book.records.values()]
        if all(bill.allocated_uj is not None for bill in bills):
            assert not any(by_task.values())
        assert len(bills) == self.requests
        assert all(bill.settled for bill in bills)
        parts_uj = sum(part.energy_uj for bill in bills for part in bill.parts)
        attributed_uj = sum(row.energy_uj for row in totals.attributed)
        known_uj = sum(bill.allocated_uj for bill in bills if bill.allocated_uj is not None)
        if all(bill.allocated_uj is not None for bill in bills):
            assert known_uj == parts_uj == attributed_uj
        # A bill of which a part is not known is null, and yet what is known of it was taken from the meter.
        assert known_uj <= attributed_uj


def live(world: World, events: int) -> None:
    for _ in range(events):
        world.happen()
        world.check()
    world.end()
    world.check_end()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from([1, 20, 100]))
def test_bills_and_the_rest_are_the_meter(seed: int, resolution_ms: int) -> None:
    live(World(seed, resolution_ms), events=60)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32))
def test_in_which_order_steps_are_recorded_does_not_matter(seed: int) -> None:
    """The threads of the executors may take turns as they like."""
    charged = []
    for order in (1, -1):
        world = World(seed)
        world.pass_time(40, 60)
        steps = [world.step(world.random.randint(1, 40), 20, device) for device in EXECUTORS]
        for step in steps[::order]:
            world.account.record(step)
        world.end()
        world.check_end()
        charged.append({name: record.bill.parts for name, record in world.book.records.items()})
    sums = [{name: sum(part.energy_uj for part in parts) for name, parts in each.items()} for each in charged]
    # Whole microjoules of a window go to one step or the other.
    assert sums[0] == pytest.approx(sums[1], abs=10)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=9), st.randoms(), st.booleans())
def test_in_which_order_a_step_names_its_requests_does_not_matter(
    tokens: list[int], random: Random, are_known: bool
) -> None:
    """Once they are known it does not at all; before, the odd microjoule goes to whoever is named first."""
    bills = []
    named = [(f"r{number}", count) for number, count in enumerate(tokens)]
    for some in (named, random.sample(named, len(named))):
        world = World(1)
        steps = [named, some] if are_known else [some]
        for each in steps:
            world.pass_time(10, 10)
            work = Work(Phase.ENCODE, *map(list, zip(*each, strict=True)))
            now_ns = world.held.now_ns
            world.account.record(step_of(work, now_ns - 10 * MS, now_ns, 10 * MS, "cpu:0"))
        world.open, world.requests = [name for name, _ in named], len(named)
        world.end()
        world.check_end()
        bills.append({name: record.bill.parts for name, record in world.book.records.items()})
    if are_known:
        assert bills[0] == bills[1]
    sums = [{name: sum(part.energy_uj for part in parts) for name, parts in each.items()} for each in bills]
    assert sums[0] == pytest.approx(sums[1], abs=4)  # active and idle energy on two devices


class ForgetfulChannel(Channel):
    """Loses every third window."""

    advances = 0

    def advance(self, *reading: object) -> None:  # type: ignore[override]
        before = len(self._windows)
        super().advance(*reading)  # type: ignore[arg-type]
        self.advances += len(self._windows) > before
        if len(self._windows) > before and self.advances % 3 == 0:
            self._windows.pop()


class SnapshotRequests(Requests):
    """Charges every request of a step what a snapshot of the counter around it shows: the whole step."""

    def charge(self, claims: Mapping[Noted, Sequence[Claim]]) -> None:
        for noted, own in claims.items():
            if noted.phase is not None:
                ((rows, _),) = self._shared([noted])
                for channel, claim in zip(noted.place.channels, own, strict=True):
                    charged = Charged(channel.device, noted.phase, noted.model, claim.quality, is_active=True)
                    whole_uj = np.full(len(rows), claim.active_uj + claim.idle_uj)
                    self.balances.charge([rows], [charged], whole_uj)


@pytest.mark.parametrize("wrong", [("Channel", ForgetfulChannel), ("Requests", SnapshotRequests)])
def test_the_check_catches_wrong_ways_to_bill(
    wrong: tuple[str, type], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(account_module, *wrong)
    world = World(7)
    with pytest.raises(AssertionError, match="on no account"):
        live(world, events=200)
    # The running service finds out too, and says so once a minute.
    caplog.clear()
    world.held.run(61_000)
    with caplog.at_level(logging.ERROR, logger="energy.account"):
        world.account.sample()
        world.account.sample()
    assert "does not balance" in caplog.text
    said = len(caplog.records)
    world.held.run(1000)
    world.account.sample()
    assert len(caplog.records) == said <= 3
