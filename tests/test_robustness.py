"""What was promised holds on a real server: killed, without disk, left by clients, with damaged files, and in two."""

import json
import resource
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.service.fakes import wait_until
from tests.service.test_server import serve
from tests.tiny import write_tiny

BODY = {"input": "I love this film"}
WITHIN_S = 30.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_tiny(root / "feels", "classify", name="feels")
    write_tiny(root / "writes", "decoder", name="writes", max_positions=512)
    return root


@contextmanager
def served(models: Path, state: Path, *flags: str) -> Iterator[tuple[Any, httpx.Client]]:
    """A server's process, and a client to it."""
    with (
        serve(4, "--models", str(models), "--state", str(state), *flags) as (process, address, _),
        httpx.Client(base_url=address, timeout=WITHIN_S) as client,
    ):
        # Its log would fill the pipe.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield process, client


def ask(client: httpx.Client) -> str:
    """The id of a request that was answered."""
    answer = client.post("/v1/sentiment", json=BODY)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def written(ledger: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {row[0] for row in database.execute("SELECT request_id FROM requests")}


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's values over all other labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rsplit(None, 1)[1]) for line in lines if all(each in line for each in wanted))


def test_a_killed_process_loses_no_more_than_its_last_second(models: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with served(models, tmp_path, "--meter", "estimate") as (process, client):
        early = {ask(client) for _ in range(20)}
        wait_until(lambda: ledger.exists() and early <= written(ledger), WITHIN_S)
        late = {ask(client) for _ in range(20)}
        process.kill()
        process.wait()
    kept = written(ledger)
    assert early <= kept <= early | late
    with served(models, tmp_path, "--meter", "estimate") as (_, client):
        assert client.get(f"/v1/energy/requests/{next(iter(early))}").json()["status"] == "ok"


def test_a_full_disk_stops_no_request_and_what_waited_is_written_later(models: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with served(models, tmp_path, "--meter", "estimate") as (process, client):
        first = ask(client)
        wait_until(lambda: first in written(ledger), WITHIN_S)
        _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, most))
        waiting = {ask(client) for _ in range(30)}
        wait_until(lambda: client.get("/readyz").json()["ledger"] is not None, WITHIN_S)
        assert metric(client, "wattle_ledger_healthy") == 0
        waiting.add(ask(client))
        assert all(client.get(f"/v1/energy/requests/{name}").status_code == 200 for name in waiting)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
        wait_until(lambda: waiting <= written(ledger), WITHIN_S)
        assert metric(client, "wattle_ledger_healthy") == 1
        assert metric(client, "wattle_ledger_dropped_records_total") == 0


def test_clients_that_leave_and_files_that_change_harm_nobody(models: Path, tmp_path: Path) -> None:
    with served(models, tmp_path) as (_, client):
        address = (client.base_url.host, client.base_url.port)
        long = {"input": "The quick brown fox", "max_tokens": 400, "model": "writes"}
        for number in range(200):
            body = json.dumps({**long, "stream": number % 2 == 0}).encode()
            head = "POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            with socket.create_connection(address) as leaver:
                leaver.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: 10 + number])
        wait_until(lambda: not metric(client, "wattle_queue_size") + metric(client, "wattle_running_size"), WITHIN_S)

        weights, before = models / "feels" / "model.onnx", client.post("/v1/sentiment", json=BODY).json()["results"]
        sound = weights.read_bytes()
        try:
            weights.write_bytes(b"altered" * 1000)
            for _ in range(20):
                assert client.post("/v1/sentiment", json=BODY).json()["results"] == before
            refused = client.post("/v1/models/load", json={"model": "feels"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "model_refused")
            assert client.post("/v1/sentiment", json=BODY).json()["results"] == before
        finally:
            weights.write_bytes(sound)
        assert client.post("/v1/models/load", json={"model": "feels"}).json()["state"] == "loaded"
        assert client.post("/v1/sentiment", json=BODY).json()["results"] == before
        # The old one goes once nobody uses it, which nobody waits for.
        wait_until(lambda: metric(client, "wattle_model_unloads_total", reason="replaced") == 1, WITHIN_S)


class Package(threading.Thread):
    """A processor's energy counter, in a powercap tree, that counts 30 W."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        zone = root / "intel-rapl:0"
        zone.mkdir(parents=True)
        (zone / "name").write_text("package-0\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        self._file = zone / "energy_uj"
        self._ends = threading.Event()
        self._write(0)

    def run(self) -> None:
        began_s = time.monotonic()
        while not self._ends.wait(0.005):
            self._write(round((time.monotonic() - began_s) * 30e6))

    def stop(self) -> float:
        """What it counted, in joules."""
        self._ends.set()
        self.join()
        return int(self._file.read_text()) / 1e6

    def _write(self, energy_uj: int) -> None:
        # In place and all at once, as the kernel's file: a meter keeps it open.
        with self._file.open("r+b" if self._file.exists() else "wb", buffering=0) as file:
            file.write(b"%015d\n" % energy_uj)


def test_two_servers_of_one_machine_bill_its_energy_once(models: Path, tmp_path: Path) -> None:
    package = Package(tmp_path / "powercap")
    package.start()
    flags = ("--meter", "powercap", "--powercap-root", str(tmp_path / "powercap"))
    with served(models, tmp_path, *flags) as (_, owner), served(models, tmp_path, *flags) as (_, other):
        asked = {name: [ask(each) for _ in range(40)] for name, each in (("owner", owner), ("other", other))}
        wait_until(lambda: {*asked["owner"], *asked["other"]} <= written(tmp_path / "ledger.sqlite"), WITHIN_S)

        def settled(client: httpx.Client, ids: list[str]) -> list[dict[str, float]]:
            wait_until(lambda: client.get(f"/v1/energy/requests/{ids[-1]}").json()["energy"]["settled"], WITHIN_S)
            # Either of the two knows the bills of both.
            return [owner.get(f"/v1/energy/requests/{name}").json()["energy"] for name in ids]

        bills = {name: settled(client, asked[name]) for name, client in (("owner", owner), ("other", other))}
        assert metric(other, "wattle_unattributed_energy_joules_total", reason="idle") == 0
        rest = [metric(each, "wattle_unattributed_energy_joules_total") for each in (owner, other)]
        meters = [metric(each, "wattle_meter_energy_joules_total") for each in (owner, other)]
        attributed = [metric(each, "wattle_attributed_energy_joules_total") for each in (owner, other)]
        residuals = [metric(each, "wattle_energy_residual_joules") for each in (owner, other)]
    counted = package.stop()
    assert residuals == [0, 0]
    assert sum(bill["allocated_j"] for bill in bills["owner"]) > sum(bill["active_j"] for bill in bills["owner"])
    assert all(bill["allocated_j"] == bill["active_j"] for bill in bills["other"])
    for each in range(2):
        assert meters[each] <= counted
        assert attributed[each] + rest[each] >= meters[each] * 0.99
    # The other's bills are of what the owner found other processes to take.
    assert 0 < attributed[0] + attributed[1] <= counted
