"""This machine's meter: counters unwrapped, CPU time told apart, a run cut out of its readings."""

import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from loadtests.meter import Counters, MachineMeter, Processes, Reading, find_listener, main, metered


def reading(at_s: float, energy_j: float, server_cpu_s: float, busy_cpu_s: float) -> Reading:
    return Reading(at_s, energy_j, "powercap", "measured", server_cpu_s, busy_cpu_s)


def test_a_run_is_cut_out_of_the_readings() -> None:
    readings = [
        reading(0, 0, 0, 0),
        reading(2, 20, 0, 0),  # 10 W when idle
        reading(12, 220, 6, 8),  # 200 J, 100 of them idle; three quarters of the CPU time are the server's
        reading(99, 999, 50, 50),
    ]
    found = metered(readings, start_s=2.0, end_s=12.0)
    assert found and (found.energy_j, found.idle_j, found.active_j, found.allocated_j) == (200, 100, 75, 175)


def test_too_few_readings_are_no_figure() -> None:
    assert metered([reading(0, 0, 0, 0)], 1.0, 2.0) is None
    assert metered([reading(0, 0, 0, 0), reading(1, 9, 1, 1)], 1.0, 2.0) is None


def zone(root: Path, folder: str, name: str, energy_uj: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    for file, text in (("name", name), ("max_energy_range_uj", "1000000"), ("energy_uj", str(energy_uj))):
        (path / file).write_text(text, encoding="ascii")
    return path / "energy_uj"


def test_counters_are_unwrapped_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:0", "dram", 0)
    for folder, name in (("intel-rapl:0:1", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, folder, name, 0).write_text("500000", encoding="ascii")
    counters = Counters(tmp_path)
    package.write_text("100000", encoding="ascii")
    memory.write_text("50000", encoding="ascii")
    assert counters.found and counters.read_j() == 0.25
    assert not Counters(tmp_path / "none").found


def test_the_listener_is_found_and_its_time_never_falls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert find_listener(listener.getsockname()[1]).pid == os.getpid()
    processes = Processes(psutil.Process())
    first = processes.cpu_s()
    assert processes.cpu_s() >= first > 0


def test_without_a_listener_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert main(["--port", str(port)]) == 1
    assert "the server's user" in capsys.readouterr().err


def test_it_streams_from_a_process_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meter = MachineMeter(listener.getsockname()[1], interval_s=0.01)
        for _ in range(1000):
            if len(meter.readings) >= 3 or meter.failure:
                break
            time.sleep(0.01)
        meter.close()
    assert len(meter.readings) >= 3, meter.failure
    first, last = meter.readings[0], meter.readings[-1]
    assert last.at_s > first.at_s and last.energy_j >= first.energy_j and last.server_cpu_s >= first.server_cpu_s
