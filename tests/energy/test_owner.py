import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from energy.account import Account
from energy.carbon import Carbon
from energy.host import Neighbours
from energy.owner import Owner
from energy.settlement import HORIZON_NS, Reason
from energy.types import RequestRecord
from tests.energy.fakes import MS, Book, CountingMeter, HeldClock, encode, step

ROOT = Path(__file__).parents[2]


def test_the_first_owns_the_processor_with_its_memory_and_the_second_says_who(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Owner(tmp_path), Owner(tmp_path)
    assert first.owns("cpu") and first.owns("dram") and first.owns("cpu")
    assert caplog.records == []
    assert not second.owns("cpu") and not second.owns("dram")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"process {os.getpid()} meters cpu" in record.getMessage()
    # Each device has its own owner. On a GPU nobody else bills anything.
    assert second.owns("gpu:1") and second.may_count("gpu:1") and second.may_count("cpu")
    assert not first.may_count("gpu:1")
    for owner in (first, second):
        owner.close()


def test_whoever_waits_takes_over_within_a_second(tmp_path: Path) -> None:
    held = HeldClock()
    first, second = (Owner(tmp_path, lambda: held.now_ns) for _ in range(2))
    assert first.owns("cpu") and not second.owns("cpu")
    first.close()
    held.run(ms=999)
    assert not second.owns("cpu")
    held.run(ms=1)
    assert second.owns("cpu")
    second.close()


def test_a_process_that_is_killed_owns_nothing(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from energy.owner import Owner
assert Owner(Path({str(tmp_path)!r})).owns("cpu")
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    owner = Owner(tmp_path)
    assert owner.owns("cpu")
    owner.close()


def test_where_no_lock_can_be_had_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    owner = Owner(tmp_path / "state")
    assert owner.owns("cpu") and owner.owns("cpu")
    assert len(caplog.records) == 1


def test_two_accounts_bill_the_idle_energy_of_one_machine_once(tmp_path: Path) -> None:
    held = HeldClock()
    meter = CountingMeter(held)
    owners = [Owner(tmp_path, lambda: held.now_ns) for _ in range(2)]
    accounts = [
        Account(
            meter,
            Carbon(),
            Book(),
            idle_uw={"cpu": 10_000_000},
            owner=owner,
            neighbours=Neighbours(Path("/nonexistent")),
            clock=held.clock,
        )
        for owner in owners
    ]
    for account in accounts:
        account.sample()
    # 1 J of idle and 0.2 J active; each process thinks that all of its CPU time is its own here.
    held.run(ms=100, cpu_ms=100)
    meter.energy_uj["cpu"] += 1_200_000
    bills = []
    for account in accounts:
        account.record(step(held, 100, encode("a")))
        account.sample()
        account.close(RequestRecord("a", "translate", "tiny", "ok"))
        account.sample()
        found = account.find("a")
        assert found is not None
        bills.append((found.bill.active_uj, found.bill.allocated_uj))
    assert bills == [(200_000, 1_200_000), (200_000, 200_000)]
    held.run(ms=HORIZON_NS // MS + 1)
    accounts[1].sample()
    others_uj = sum(row.energy_uj for row in accounts[1].totals().unattributed if row.reason is Reason.OTHER_PROCESSES)
    assert others_uj == 1_000_000
    for account in accounts:
        account.shutdown()
