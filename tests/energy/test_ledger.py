import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from energy import ledger as ledger_module
from energy.carbon import Carbon
from energy.ledger import Ledger
from energy.types import Bill, Quality, RequestRecord, SettledRecord
from tests.energy.fakes import HeldClock

DAY_S = 86_400


def record(request_id: str, time_s: float = 1_700_000_000.0, allocated_uj: int | None = 30) -> SettledRecord:
    return SettledRecord(
        request=RequestRecord(request_id, "translate", "tiny", "ok", 5, 6, 1.5, 2.5),
        bill=Bill(request_id, 20, allocated_uj, 0.25, Quality.MEASURED, True),
        time_s=time_s,
        carbon=Carbon("DEU", embodied_kg=100).assumptions,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_INTERVAL_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def held() -> HeldClock:
    return HeldClock()


@pytest.fixture
def ledger(path: Path, held: HeldClock) -> Iterator[Ledger]:
    ledger = Ledger(path, retention_days=2, clock=held.clock)
    yield ledger
    ledger.close()


def rows(path: Path) -> int:
    with sqlite3.connect(path) as database:
        count = database.execute("SELECT count(*) FROM requests").fetchone()[0]
    database.close()
    return int(count)


def test_a_record_comes_back_as_it_was_before_and_after_it_is_written(ledger: Ledger, path: Path) -> None:
    ledger.put(record("a"))
    ledger.put(record("b", allocated_uj=None))
    assert ledger.find("a") == record("a")
    wait_until(lambda: rows(path) == 2)
    assert ledger.find("a") == record("a")
    assert ledger.find("b") == record("b", allocated_uj=None)
    assert ledger.find("c") is None
    assert ledger.healthy


def test_a_later_record_replaces_an_earlier_one(ledger: Ledger, path: Path) -> None:
    ledger.put(record("a", allocated_uj=1))
    wait_until(lambda: rows(path) == 1)
    ledger.put(record("a", allocated_uj=2))
    ledger.close()
    assert ledger.find("a") == record("a", allocated_uj=2)
    assert rows(path) == 1


def test_records_survive_closing_and_opening(path: Path, held: HeldClock) -> None:
    first = Ledger(path, clock=held.clock)
    first.put(record("a"))
    first.close()
    second = Ledger(path, clock=held.clock)
    assert second.find("a") == record("a")
    second.close()


def test_what_was_committed_survives_a_killed_process(path: Path) -> None:
    program = f"""
import os, sys, time
from pathlib import Path
from energy import ledger
from tests.energy.test_ledger import record, rows
ledger._INTERVAL_S = 0.02
path = Path({str(path)!r})
book = ledger.Ledger(path)
book.put(record("a", time_s=time.time()))
while rows(path) < 1:
    time.sleep(0.005)
os.kill(os.getpid(), 9)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == -9
    ledger = Ledger(path)
    found = ledger.find("a")
    ledger.close()
    assert found is not None
    assert found == record("a", time_s=found.time_s)


def test_records_older_than_the_retention_go(ledger: Ledger, path: Path, held: HeldClock) -> None:
    ledger.put(record("old", time_s=held.wall_s - 2 * DAY_S - 1))
    ledger.put(record("new", time_s=held.wall_s - 2 * DAY_S + 1))
    wait_until(lambda: ledger.find("old") is None)
    assert ledger.find("new") is not None
    assert rows(path) == 1


def test_many_threads_write_at_once(ledger: Ledger, path: Path) -> None:
    def put(thread: int) -> None:
        for i in range(50):
            ledger.put(record(f"{thread}-{i}"))

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    assert rows(path) == 200


def test_a_place_that_cannot_be_written_is_said_and_found_again_when_mended(
    tmp_path: Path, held: HeldClock, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "state"
    in_the_way.write_text("a file where a folder should be")
    ledger = Ledger(in_the_way / "ledger.sqlite", clock=held.clock)
    assert not ledger.healthy
    assert ledger.failure
    ledger.put(record("a"))
    assert ledger.find("a") == record("a")
    assert ledger.find("b") is None
    assert "the service goes on without it" in caplog.text
    in_the_way.unlink()
    wait_until(lambda: ledger.healthy)
    ledger.close()
    assert rows(in_the_way / "ledger.sqlite") == 1
    assert len(caplog.records) == 2


def test_a_full_disk_keeps_a_bounded_number_of_records(
    tmp_path: Path, held: HeldClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 3)
    ledger = Ledger(tmp_path, clock=held.clock)  # a folder: SQLite cannot open it
    for i in range(5):
        ledger.put(record(f"r{i}"))
    assert [ledger.find(f"r{i}") is not None for i in range(5)] == [False, False, True, True, True]
    ledger.close()
    assert not ledger.healthy


def test_a_schema_of_the_future_is_left_alone(path: Path, held: HeldClock) -> None:
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    ledger = Ledger(path, clock=held.clock)
    ledger.put(record("a"))
    ledger.close()
    assert ledger.failure == "its schema has version 9; this program writes 1"


def test_a_record_put_while_another_is_written_is_not_lost(ledger: Ledger) -> None:
    for allocated_uj in range(200):
        ledger.put(replace(record("a"), bill=replace(record("a").bill, allocated_uj=allocated_uj)))
    ledger.close()
    found = ledger.find("a")
    assert found is not None and found.bill.allocated_uj == 199
