"""Zeus and CodeCarbon read the same counter for a while as the account does, under load.

They are oracles for long windows, not for a request: neither shares a step among its requests. They come with the
extra [oracles], which wants an environment of its own; ORACLE_SECONDS is how long they watch.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from energy.account import Account
from energy.carbon import Carbon
from energy.clock import Clock
from energy.meters.powercap import open_powercap
from energy.owner import Owner
from energy.sampler import Sampler
from energy.types import RequestRecord
from tests.energy.fakes import Book, encode, step_of, together, write_zone

zeus = pytest.importorskip("zeus.device.cpu.rapl", reason="the extra [oracles] is not installed")
codecarbon = pytest.importorskip("codecarbon.core.cpu", reason="the extra [oracles] is not installed")
units = pytest.importorskip("codecarbon.core.units", reason="the extra [oracles] is not installed")

WATTS = 42
J_PER_KWH = 3.6e6


@pytest.fixture
def powercap(tmp_path: Path) -> Iterator[Path]:
    """A powercap tree of a package that takes 42 W, counted every millisecond or so."""
    root = tmp_path / "intel-rapl"
    zone = write_zone(root / "intel-rapl:0", "package-0", 0)
    over = threading.Event()

    def count() -> None:
        # In place, as the kernel does: readers hold the file open.
        descriptor = os.open(zone / "energy_uj", os.O_WRONLY)
        started_ns = time.monotonic_ns()
        while not over.wait(0.001):
            os.pwrite(descriptor, f"{WATTS * (time.monotonic_ns() - started_ns) // 1000:<20}\n".encode(), 0)
        os.close(descriptor)

    thread = threading.Thread(target=count)
    thread.start()
    yield root
    over.set()
    thread.join()


def load(account: Account, until_s: float) -> None:
    """Steps of four requests, each of about 10 ms, and closes them."""
    number = 0
    while time.monotonic() < until_s:
        started_ns, started_cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        while time.monotonic_ns() - started_ns < 10_000_000:
            sum(range(1000))
        names = [f"r{number + i}" for i in range(4)]
        number += 4
        cpu_ns = time.thread_time_ns() - started_cpu_ns
        work = together(*map(encode, names))
        account.record(step_of(work, started_ns, time.monotonic_ns(), cpu_ns))
        for name in names:
            account.close(RequestRecord(name, "translate", "tiny", "ok"))


def test_all_three_see_the_same_energy(powercap: Path, tmp_path: Path) -> None:
    seconds = float(os.environ.get("ORACLE_SECONDS", "3"))
    meter = open_powercap(powercap, Clock())
    package = zeus.RAPLFile(str(powercap / "intel-rapl:0"))
    rapl = codecarbon.IntelRAPL(rapl_dir=str(powercap))
    book = Book()
    account = Account(meter, Carbon(), book, idle_uw={"cpu": 10_000_000}, owner=Owner(tmp_path))
    package.read()  # starts the process that watches for wrap-around
    with Sampler(account, interval_s=0.05):
        account.sample()
        first_uj = account.totals().meters[0]
        zeus_mj = package.read()
        rapl.start()
        started_s = time.monotonic()
        load(account, started_s + seconds)
        account.sample()
        elapsed_s = time.monotonic() - started_s
        last_uj = account.totals().meters[0]
        zeus_j = (package.read() - zeus_mj) / 1e3

        details = rapl.get_cpu_details(units.Time.from_seconds(elapsed_s))
    account.shutdown()
    codecarbon_j = J_PER_KWH * sum(value for name, value in details.items() if "Energy" in name)
    counted_j = [(total.settled_uj + total.open_uj + total.residual_uj) / 1e6 for total in (first_uj, last_uj)]
    wattle_j = counted_j[1] - counted_j[0]
    billed_j = sum(record.bill.allocated_uj or 0 for record in book.records.values()) / 1e6
    print(
        f"\n{elapsed_s:.1f} s at {WATTS} W: {WATTS * elapsed_s:.2f} J; Wattle {wattle_j:.2f} J, of which on "
        f"{len(book.records)} bills {billed_j:.2f} J; Zeus {zeus_j:.2f} J; CodeCarbon {codecarbon_j:.2f} J"
    )
    # Each looks at its own moment: what differs is the time between the looks.
    slack_j = WATTS * 0.5
    assert wattle_j == pytest.approx(WATTS * elapsed_s, abs=slack_j)
    assert zeus_j == pytest.approx(wattle_j, abs=slack_j)
    assert codecarbon_j == pytest.approx(wattle_j, abs=slack_j)
    assert last_uj.residual_uj == 0
