"""The engine's work on real models, billed by a real account while requests come, fail and go away."""

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

import wattle
from energy.account import Account
from energy.carbon import Carbon
from energy.clock import Clock
from energy.meters.estimator import Estimator, PowerModel
from energy.sampler import Sampler
from energy.types import Phase, Quality, RequestRecord, Shares, Work
from service.app import create_app
from service.engine import executor
from service.engine.engine import Engine
from service.engine.settings import EngineSettings
from service.engine.types import EncodeItem, EngineClosed, Item, Sampling, WriteItem
from service.keys import add_key
from service.metering_cost import _BESIDE, _PURPOSES, Kind, Share, _cost, _Rig, _Slice, _Spent, main
from service.settings import read_settings
from tests.energy.fakes import Book, step_of
from tests.service.fakes import wait_until
from tests.tiny import Loaded, load_tiny, write_tiny

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("models")
    return {"reads": load_tiny(root, "classify", "reads"), "writes": load_tiny(root, "decoder", "writes")}


class Failure(Exception):
    pass


def fail(written: Sequence[int]) -> bool:
    raise Failure


def item(number: int) -> Item:
    """Of every ten requests, one fails in the middle of its batch; half of them write."""
    ids = tuple(6 + (number + i) % 80 for i in range(3 + number % 9))
    if number % 2:
        return EncodeItem(f"r{number}", ids)
    sampling = Sampling(max_tokens=4 + number % 8)
    return WriteItem(f"r{number}", ids, sampling, fail if number % 10 == 4 else None)


class Rig:
    """An engine of two executors, an account with a sampling thread, and as many clients as wanted."""

    def __init__(self, loaded: dict[str, Loaded]) -> None:
        self.book = Book()
        model = PowerModel(watts_per_core=3.5, cores=2, memory_gb=8, basis="a test")
        self.account = Account(Estimator(model, Clock()), Carbon(), self.book, executors=2)
        self.engine = Engine(loaded, self.account.record, EngineSettings(executors=2))

    def live(self, clients: int, requests: int) -> None:
        with Sampler(self.account, interval_s=0.005):
            numbers = iter(range(requests))
            lock = threading.Lock()

            def client() -> None:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    self._ask(number)

            threads = [threading.Thread(target=client) for _ in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_S)
            self.engine.close()
        self.account.shutdown()

    def _ask(self, number: int) -> None:
        wanted = item(number)
        model = "reads" if isinstance(wanted, EncodeItem) else "writes"
        (ticket,) = self.engine.submit(model, [wanted])
        status = "ok"
        try:
            if number % 7 == 3:
                ticket.future.cancel()
                status = "cancelled"
            else:
                ticket.future.result(WAIT_S)
        except (Failure, EngineClosed):
            status = "failed"
        self.account.close(RequestRecord(f"r{number}", "generate", model, status))


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_bills_over_the_meter_are_one_however_many_are_in_flight(loaded: dict[str, Loaded], clients: int) -> None:
    rig = Rig(loaded)
    rig.live(clients, requests=max(40, 2 * clients))
    totals = rig.account.totals()
    attributed: Counter[str] = Counter()
    for row in totals.attributed:
        attributed[row.device] += row.energy_uj
    billed: Counter[str] = Counter()
    for record in rig.book.records.values():
        assert record.bill.settled
        assert record.bill.quality is Quality.ESTIMATED
        for part in record.bill.parts:
            billed[part.device] += part.energy_uj
        assert sum(part.energy_uj for part in record.bill.parts) == record.bill.allocated_uj
    assert len(rig.book.records) == max(40, 2 * clients)
    assert {record.request.status for record in rig.book.records.values()} == {"ok", "cancelled", "failed"}
    assert billed == attributed
    for total in totals.meters:
        unattributed = sum(row.energy_uj for row in totals.unattributed if row.device == total.device)
        metered_uj = total.settled_uj + total.open_uj + total.residual_uj
        assert billed[total.device] + unattributed + total.open_uj == metered_uj
        assert total.residual_uj == 0
    # Work that was done for a request that failed or was cancelled stays on it.
    failed = [record.bill for record in rig.book.records.values() if record.request.status == "failed"]
    assert failed and all(bill.allocated_uj for bill in failed)
    answered = [record for record in rig.book.records.values() if record.request.status == "ok"]
    assert all(record.bill.allocated_uj for record in answered)


def test_a_service_that_only_measures_needs_no_key(
    loaded: dict[str, Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_key(tmp_path / "keys.toml", "somebody", {})
    monkeypatch.setenv("WATTLE_API_KEYS_FILE", str(tmp_path / "keys.toml"))
    with wattle._asking(loaded["writes"].folder) as ask:
        assert ask("generate", {"input": "1", "max_tokens": 2})["results"]


@pytest.mark.parametrize("meter", ["none", "estimate"])
def test_without_a_meter_no_step_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meter: str) -> None:
    write_tiny(tmp_path / "model", "classify")
    share_load, shared = executor.share_load, []

    def counted(*step: Any) -> Shares:
        shared.append(share_load(*step))
        return shared[-1]

    monkeypatch.setattr(executor, "share_load", counted)
    settings = read_settings(models=str(tmp_path / "model"), state=str(tmp_path), meter=meter)
    with TestClient(create_app(settings)) as client:
        address = f"/v1/energy/requests/{client.post('/v1/sentiment', json={'input': '6'}).json()['id']}"
        wait_until(lambda: client.get(address).json()["energy"]["settled"], WAIT_S)
        energy = client.get(address).json()["energy"]
    if meter == "none":
        assert (shared, energy["active_j"], energy["quality"]) == ([], None, "unavailable")
    else:
        assert shared and energy["active_j"] is not None


def test_the_cost_of_metering_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("reads", "classify"), ("writes", "encoder-decoder")):
        write_tiny(tmp_path / name, kind)
    monkeypatch.setattr("energy.sampler._TOGETHER", 1)
    monkeypatch.setattr("service.metering_cost._REST_S", 0.3)
    monkeypatch.setattr("service.metering_cost.SLICE_S", 0.2)
    monkeypatch.setattr("service.metering_cost._LEFT_OUT_S", 0.1)
    monkeypatch.setattr("service.metering_cost.TURN_S", sys.getswitchinterval())
    assert main([str(tmp_path / "reads"), str(tmp_path / "writes"), "--turns", "3"]) == 0
    told = capsys.readouterr().out
    assert re.match(r"\S+, \S+, 32 requests at once, 3 turns of slices of \d", told) is not None
    assert re.search(r"^with metering [1-9]\d* requests; .* answered otherwise 0$", told, re.M) is not None
    for name, keeps in (("off, with WATTLE_METER=none", True), ("bare, without any account", False)):
        found = re.search(rf"^{name}: [1-9]\d* us of .*, (.*) of them to keep it\n((?:  .*\n?)+)", told, re.M)
        assert found is not None
        kept_us, against = found.groups()
        assert (float(kept_us) > 0) == keeps
        (spent_us,) = re.findall(r"^CPU time of metering itself: (.*) us per request$", told, re.M)
        (added_us,) = re.findall(r"by adding up, (.*) us, ", against)
        assert float(added_us) == pytest.approx(float(spent_us) - float(kept_us), abs=0.2)
        assert re.search(r"^  metering adds, by adding up, -?\d+\.\d us, -?\d+\.\d\d%$", against, re.M) is not None
        verdict = r"[^%]*% \(95% interval .*% to .*%\); under 1%: (yes|no|not decided)$"
        for figure in ("CPU time added", "time added, of which throughput is the inverse", "left for steps alone"):
            assert re.search(rf"{figure}: {verdict}", against, re.M) is not None
        assert re.search(r"^    cores kept busy [+-]\d\.\d{3} \(", against, re.M) is not None
    spent_us = dict(
        re.findall(r"[(,] ?(\w+) (-?\d+\.\d)", "".join(re.findall(r"^  \w+ [\d.]+ us (\(.*\))$", told, re.M)))
    )
    assert set(spent_us) == {what for whats in _PURPOSES.values() for what in whats}
    assert all(float(spent_us[what]) > 0 for what in ("recording", "closing", "settling", "publishing", "ledger"))


def test_a_share_is_decided_where_its_interval_lies_on_one_side() -> None:
    assert "yes" in str(Share.of([0.004, 0.005, 0.006] * 10))
    assert "no" in str(Share.of([0.02, 0.03, 0.04] * 10))
    assert "not decided" in str(Share.of([-0.02, 0.01, 0.03] * 10))
    # Neither a round that another program disturbed nor a lucky one moves it.
    assert Share.of([0.005] * 28 + [9.0, -0.9]).value == pytest.approx(0.005)


def kept_slice(kind: Kind, steps: int, step_ms: float, busy_cores: float) -> _Slice:
    """A second in which an executor runs so many steps, the first of which counts for nothing."""
    one = step_of(Work(Phase.ENCODE, ["r"], [10]), cpu_ns=round(step_ms * 1e6))
    kept = _Slice(kind, requests=steps, elapsed_s=1.0, loop_ns=steps * 1000, process_ns=round(busy_cores * 1e9))
    kept.steps[one.device] = [(one, number * one.cpu_ns) for number in range(steps + 1)]
    return kept


def test_lost_throughput_is_what_steps_have_less_of_whatever_the_speed_of_the_machine() -> None:
    turns = []
    for slower in (1.0, 1.5, 1.25):
        # Metered, steps get 0.76 of 0.8 seconds, and a hundredth of a core waits; and the machine is just then slower.
        metered = kept_slice(Kind.METERED, round(760 / slower), slower, 1.79)
        others = [kept_slice(kind, 800, 1.0, 1.80) for kind in Kind if kind is not Kind.METERED]
        turns.append([metered, *others])
    # A millisecond of settling for each of 100 requests, and 0.4 ms for each of 50 without a meter.
    spent = _Spent(100, 50, 10, {**dict.fromkeys(_BESIDE, 0), "settling": 10**8}, 2 * 10**7)
    cost = _cost(turns, spent, 0, None)
    for against, settling_us in ((cost.against_off, 600), (cost.against_bare, 1000)):
        assert against.room.value == pytest.approx(0.8 / 0.76 - 1, abs=0.001)
        assert against.busy_cores.value == pytest.approx(-0.01)
        assert against.time.value > 0.2
        assert against.added_us["settling and ledger"].value == pytest.approx(settling_us)


def test_slices_are_longer_where_requests_take_long() -> None:
    for longest_s, lengths_s in ((8.0, (8, 32)), (0.03, (0.5, 1))):
        rig = SimpleNamespace(_longest_s=longest_s)
        _Rig.lengthen(cast(_Rig, rig))
        assert (rig._left_out_s, rig._slice_s) == lengths_s


def test_the_meters_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    estimate = ["meters", "--meter", "estimate", "--watts-per-core", "5"]
    assert wattle.main([*estimate, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [device["device"] for device in found["devices"]] == ["cpu", "dram"]
    assert wattle.main(["meters", "--meter", "powercap", "--powercap-root", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().out
    assert wattle.main([*estimate, "--pid", "1"]) == 2
    assert wattle.main(["meters", "--stream", "--meter", "powercap", "--powercap-root", str(tmp_path)]) == 1
    assert "the stream has ended" in capsys.readouterr().err


def test_the_meters_are_streamed_until_nobody_reads() -> None:
    command = [sys.executable, "-m", "wattle", "meters", "--stream", "--meter", "estimate"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as streaming:
        assert streaming.stdout is not None and streaming.stderr is not None
        first, second = (json.loads(streaming.stdout.readline()) for _ in range(2))
        assert first["devices"][1]["energy_j"] < second["devices"][1]["energy_j"]
        streaming.stdout.close()
        assert streaming.wait(WAIT_S) == 0
        assert streaming.stderr.read() == ""
