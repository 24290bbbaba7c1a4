import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from energy import ledger as ledger_module
from energy.carbon import Carbon
from energy.ledger import Ledger, LedgerUnreadable
from energy.types import Bill, Bills, Part, Phase, Quality, RequestRecord, SettledRecord
from tests.energy.fakes import HeldClock

DAY_S = 86_400
PARTS = (Part("cpu", Phase.PREFILL, 18), Part("dram", Phase.DECODE, 12))
ROOT = Path(__file__).parents[2]


def record(request_id: str, time_s: float = 1_700_000_000.0, allocated_uj: int | None = 30) -> SettledRecord:
    return SettledRecord(
        request=RequestRecord(request_id, "translate", "tiny", "ok", 5, 6, 1.5, 2.5, "team-a"),
        bill=Bill(request_id, 20, allocated_uj, 0.25, Quality.MEASURED, True, PARTS),
        time_s=time_s,
        carbon=Carbon("DEU", embodied_kg=100).assumptions,
    )


def alike(*records: SettledRecord) -> Bills:
    """These as columns."""
    each = list(map(Bills.of, records))
    columns = "times_s", "parts_uj", "active_uj", "allocated_uj", "gco2e"
    together = {name: np.concatenate([getattr(bills, name) for bills in each]) for name in columns}
    return replace(each[0], requests=[bills.requests[0] for bills in each], **together)


def test_bills_are_the_same_as_columns() -> None:
    records = [record("a"), record("b", time_s=5.0, allocated_uj=7)]
    bills = alike(*records)
    assert [list(Bills.of(each)) for each in records] == [[each] for each in records]
    assert (list(bills), len(bills), bills[-1]) == (records, 2, records[1])
    unknown = record("c", allocated_uj=None)
    assert list(Bills.of(unknown)) == [unknown]
    assert json.loads(bills.places.names) == [["cpu", "prefill"], ["dram", "decode"]]
    assert bills.parts_uj.tolist() == [[18, 12], [18, 12]]


@pytest.mark.parametrize("parts", [(), PARTS[:1], PARTS])
def test_many_bills_at_once_are_each_found(ledger: Ledger, parts: tuple[Part, ...]) -> None:
    records = [record(f"r{i}", time_s=1_700_000_000.0 + i, allocated_uj=i) for i in range(3)]
    records = [each._replace(bill=each.bill._replace(parts=parts)) for each in records]
    ledger.put(alike(*records), Bills.of(record("other")))
    found = [ledger.find(each.request.request_id) for each in records]
    ledger.close()
    assert found == [ledger.find(each.request.request_id) for each in records] == records
    assert ledger.find("other") == record("other")


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
    ledger = Ledger(path, max_days=2, clock=held.clock)
    yield ledger
    ledger.close()


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("SELECT count(*) FROM requests").fetchone()[0])


def test_a_record_comes_back_as_it_was_before_and_after_it_is_written(ledger: Ledger, path: Path) -> None:
    ledger.put(Bills.of(record("a")))
    ledger.put(Bills.of(record("b", allocated_uj=None)))
    assert ledger.find("a") == record("a")
    wait_until(lambda: rows(path) == 2)
    assert ledger.find("a") == record("a")
    assert ledger.find("b") == record("b", allocated_uj=None)
    assert ledger.find("c") is None
    assert ledger.healthy


def test_a_later_record_replaces_an_earlier_one(ledger: Ledger, path: Path) -> None:
    ledger.put(Bills.of(record("a", allocated_uj=1)))
    wait_until(lambda: rows(path) == 1)
    ledger.put(Bills.of(record("a", allocated_uj=2)))
    ledger.close()
    assert ledger.find("a") == record("a", allocated_uj=2)
    assert rows(path) == 1


def test_records_survive_closing_and_opening(path: Path, held: HeldClock) -> None:
    first = Ledger(path, clock=held.clock)
    first.put(Bills.of(record("a")))
    first.close()
    second = Ledger(path, clock=held.clock)
    assert second.find("a") == record("a")
    second.close()


def run_killed(program: str, *arguments: str) -> None:
    """Run a program that ends itself with SIGKILL."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


def test_what_was_written_survives_a_killed_process_without_a_gap(path: Path) -> None:
    program = """
import os, signal, sys, time
from pathlib import Path
from energy import ledger
from energy.types import Bills
from tests.energy.test_ledger import record, rows
ledger._INTERVAL_S = 0.01
path = Path(sys.argv[1])
book = ledger.Ledger(path)
number = 0
while number < 50 or rows(path) < 50:
    book.put(Bills.of(record(f"{number:06}", time_s=time.time())))
    number += 1
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_killed(program, str(path))
    ledger = Ledger(path)
    ledger.put(Bills.of(record("after", time_s=time.time())))
    ledger.close()
    assert ledger.healthy
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [name for (name,) in database.execute("SELECT request_id FROM bills ORDER BY rowid")]
    assert len(found) > 50
    assert found == [*(f"{number:06}" for number in range(len(found) - 1)), "after"]


def test_records_older_than_the_retention_go(ledger: Ledger, path: Path, held: HeldClock) -> None:
    ledger.put(Bills.of(record("old", time_s=held.wall_s - 2 * DAY_S - 1)))
    ledger.put(Bills.of(record("new", time_s=held.wall_s - 2 * DAY_S + 1)))
    wait_until(lambda: ledger.find("old") is None)
    assert ledger.find("new") is not None
    assert rows(path) == 1


def test_many_threads_write_at_once(ledger: Ledger, path: Path) -> None:
    def put(thread: int) -> None:
        for i in range(50):
            ledger.put(Bills.of(record(f"{thread}-{i}")))

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
    ledger.put(Bills.of(record("a")))
    assert ledger.find("a") == record("a")
    with pytest.raises(LedgerUnreadable, match="unable to open database file"):
        ledger.find("b")
    assert "the service goes on without it" in caplog.text
    in_the_way.unlink()
    wait_until(lambda: ledger.healthy)
    ledger.close()
    assert rows(in_the_way / "ledger.sqlite") == 1
    assert len(caplog.records) == 2


def test_a_file_that_is_removed_while_it_is_written_is_made_anew(path: Path, ledger: Ledger) -> None:
    ledger.put(Bills.of(record("a")))
    wait_until(lambda: not (ledger._waiting or ledger._writing))
    for file in path.parent.iterdir():
        file.unlink()
    ledger.put(Bills.of(record("b")))
    wait_until(lambda: not (ledger._waiting or ledger._writing))
    assert rows(path) == 1
    assert ledger.find("b") == record("b")
    assert ledger.find("a") is None
    assert ledger.healthy


def test_a_full_disk_keeps_a_bounded_number_of_records(
    tmp_path: Path, held: HeldClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_WAITING", 3)
    ledger = Ledger(tmp_path, clock=held.clock)  # a folder: SQLite cannot open it
    for i in range(5):
        ledger.put(Bills.of(record(f"r{i}")))
    wait_until(lambda: list(ledger._waiting) == ["r2", "r3", "r4"])
    assert ledger.dropped == 2
    ledger.close()
    assert not ledger.healthy


def test_a_schema_of_the_future_is_left_alone(path: Path, held: HeldClock) -> None:
    path.parent.mkdir()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    ledger = Ledger(path, clock=held.clock)
    ledger.put(Bills.of(record("a")))
    ledger.close()
    assert ledger.failure == "its schema has version 9; this program knows up to 3"


def test_a_record_put_while_another_is_written_is_not_lost(ledger: Ledger) -> None:
    for allocated_uj in range(200):
        ledger.put(Bills.of(record("a", allocated_uj=allocated_uj)))
    ledger.close()
    found = ledger.find("a")
    assert found is not None and found.bill.allocated_uj == 199


def test_the_latest_come_first_written_or_not(ledger: Ledger, path: Path) -> None:
    start_s = HeldClock().wall_s
    for i in range(5):
        ledger.put(Bills.of(record(f"r{i}", time_s=start_s + i)))
    wait_until(lambda: rows(path) == 5)
    ledger.put(Bills.of(record("r6", time_s=start_s + 6)))
    assert [each.request.request_id for each in ledger.latest(3)] == ["r6", "r4", "r3"]


def test_a_ledger_that_is_absent_is_unreadable_and_says_so_without_its_path(path: Path, ledger: Ledger) -> None:
    ledger.close()
    path.unlink()
    with pytest.raises(LedgerUnreadable, match="unable to open database file"):
        ledger.latest(1)


class TestOfVersionOne:
    """A file as the first version wrote it."""

    SCHEMA = """
        CREATE TABLE requests (
            request_id TEXT PRIMARY KEY, time_s REAL NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL,
            status TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
            queue_ms REAL NOT NULL, compute_ms REAL NOT NULL, active_uj INTEGER, allocated_uj INTEGER, gco2e REAL,
            quality TEXT NOT NULL, settled INTEGER NOT NULL, carbon TEXT NOT NULL
        ) WITHOUT ROWID;
        CREATE INDEX requests_by_time ON requests (time_s);
        PRAGMA user_version = 1;
    """
    CARBON = (
        '{"zone": "DEU", "gco2e_per_kwh": 380.95, "grid_source": "a table", "pue": 1.0, "embodied_kg": null,'
        ' "life_years": 4.0}'
    )

    @pytest.fixture
    def old(self, path: Path, held: HeldClock) -> Path:
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as database:
            database.executescript(self.SCHEMA)
            row = (held.wall_s, "translate", "tiny", "ok", 5, 6, 1.5, 2.5, 20, 30, 0.25, "measured", 1, self.CARBON)
            with database:
                database.executemany(
                    f"INSERT INTO requests VALUES ({', '.join('?' * 15)})", [("a", *row), ("b", *row)]
                )
        return path

    def test_its_records_stay_and_new_ones_join_them(self, old: Path, held: HeldClock) -> None:
        ledger = Ledger(old, clock=held.clock)
        ledger.put(Bills.of(record("c")))
        ledger.close()
        assert ledger.healthy
        assert rows(old) == 3
        found = ledger.find("a")
        assert found is not None
        assert found.request == record("a").request._replace(key=None)
        assert found.bill == record("a").bill._replace(parts=())
        assert (found.carbon.zone, found.carbon.machine_share) == ("DEU", 1.0)
        assert ledger.find("c") == record("c")

    def test_an_upgrade_that_is_interrupted_leaves_it_as_it_was(self, old: Path) -> None:
        with closing(sqlite3.connect(old)) as database:
            # The table that the upgrade makes is there already: it fails half-way.
            database.execute("CREATE TABLE bills (something)")
        ledger = Ledger(old)
        ledger.close()
        assert "table bills already exists" in (ledger.failure or "")
        with closing(sqlite3.connect(old)) as database:
            assert database.execute("PRAGMA user_version").fetchone() == (1,)
            assert database.execute("SELECT count(*) FROM requests").fetchone() == (2,)


class TestOfVersionTwo:
    """A file as the second version wrote it."""

    SCHEMA = """
        CREATE TABLE carbon (carbon_id INTEGER PRIMARY KEY, assumptions TEXT NOT NULL UNIQUE);
        CREATE TABLE requests (
            request_id TEXT NOT NULL UNIQUE, time_s REAL NOT NULL, task TEXT NOT NULL, model TEXT NOT NULL, "key" TEXT,
            status TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
            queue_ms REAL NOT NULL, compute_ms REAL NOT NULL, active_uj INTEGER, allocated_uj INTEGER, gco2e REAL,
            quality TEXT NOT NULL,
            settled INTEGER NOT NULL, parts TEXT NOT NULL DEFAULT '[]', carbon_id INTEGER NOT NULL REFERENCES carbon
        );
        CREATE INDEX requests_by_time ON requests (time_s);
        PRAGMA user_version = 2;
    """

    def test_its_records_are_as_they_were(self, path: Path, held: HeldClock) -> None:
        path.parent.mkdir()
        figures = (held.wall_s, "translate", "tiny", "team-a", "ok", 5, 6, 1.5, 2.5, 20, 30, 0.25, "measured", 1)
        parts = '[["cpu","prefill",18],["dram","decode",12]]'
        with closing(sqlite3.connect(path)) as database:
            database.executescript(self.SCHEMA)
            with database:
                database.execute("INSERT INTO carbon VALUES (7, ?)", (json.dumps(asdict(record("a").carbon)),))
                rows = [("a", *figures, parts, 7), ("b", *figures, "[]", 7)]
                database.executemany(f"INSERT INTO requests VALUES ({', '.join('?' * 17)})", rows)
        ledger = Ledger(path, clock=held.clock)
        ledger.put(Bills.of(record("c")))
        ledger.close()
        assert ledger.healthy
        assert ledger.find("a") == record("a")
        assert ledger.find("b") == record("b")._replace(bill=record("b").bill._replace(parts=()))
        assert ledger.find("c") == record("c")
        with closing(sqlite3.connect(path)) as database:
            written = database.execute("SELECT parts, count(DISTINCT kind_id) FROM requests GROUP BY 1 ORDER BY 1")
            assert written.fetchall() == [(parts, 1), ("[]", 1)]
            assert not database.execute("SELECT * FROM sqlite_master WHERE name IN ('earlier', 'carbon')").fetchall()


def test_the_oldest_go_when_the_file_grows_too_large(path: Path, held: HeldClock) -> None:
    ledger = Ledger(path, max_mb=0.2, clock=held.clock)
    start_s = held.wall_s
    for i in range(2500):
        ledger.put(Bills.of(record(f"{i:06}", time_s=start_s + i)))
    wait_until(lambda: not (ledger._waiting or ledger._writing))
    ledger.close()
    assert path.stat().st_size <= 200_000
    kept = rows(path)
    assert 900 < kept < 2000
    assert ledger.find("002499") is not None
    assert ledger.find(f"{2500 - kept:06}") is not None
    assert ledger.find(f"{2499 - kept:06}") is None


FULL_DISK = """
import logging, resource, signal, sys, time
from pathlib import Path
from energy import ledger
from energy.types import Bills
from tests.energy.test_ledger import record, rows, wait_until
ledger._INTERVAL_S = 0.01
logging.basicConfig(stream=sys.stdout, format="%(message)s")
path = Path(sys.argv[1])
book = ledger.Ledger(path)
book.put(Bills.of(record("before", time_s=time.time())))
wait_until(lambda: rows(path) == 1)
# No file may grow any more, as on a disk that is full.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
book.put(Bills.of(record("meanwhile", time_s=time.time())))
wait_until(lambda: not book.healthy)
time.sleep(0.1)
assert book.find("meanwhile")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
wait_until(lambda: book.healthy)
assert book.find("before") and rows(path) == 2
book.close()
"""
READ_ONLY_DISK = """
import logging, os, sys, time
from pathlib import Path
from energy import ledger
from energy.types import Bills
from tests.energy.test_ledger import record, rows, wait_until
ledger._INTERVAL_S = 0.01
logging.basicConfig(stream=sys.stdout, format="%(message)s")
path = Path(sys.argv[1])
book = ledger.Ledger(path)
book.put(Bills.of(record("before", time_s=time.time())))
wait_until(lambda: rows(path) == 1)
book.close()
if os.geteuid() == 0:  # who may write everywhere
    os.chown(path.parent, 65534, 65534)
    os.chown(path, 65534, 65534)
    os.setuid(65534)
path.chmod(0o444)
path.parent.chmod(0o555)
book = ledger.Ledger(path)
book.put(Bills.of(record("meanwhile", time_s=time.time())))
time.sleep(0.1)
assert book.failure == "attempt to write a readonly database", book.failure
assert book.find("before") and book.find("meanwhile")
assert len(book.latest(9)) == 2
path.parent.chmod(0o755)
path.chmod(0o644)
wait_until(lambda: book.healthy)
assert rows(path) == 2
book.close()
"""


@pytest.mark.parametrize("program", [FULL_DISK, READ_ONLY_DISK], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing_is_said_once_and_loses_nothing(program: str) -> None:
    # Not pytest's own folder: only its owner may enter that.
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "state" / "ledger.sqlite"
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    cannot, can = done.stdout.splitlines()
    assert "the service goes on without it" in cannot
    assert "is written again; 0 records were dropped" in can
