"""This machine's meter: CPU time told apart, a run cut out of its readings."""

import json
import os
import socket
import time

import psutil
import pytest

from loadtests.meter import MachineMeter, Processes, Reading, find_listener, metered, read_line


def reading(at_s: float, cpu_j: float, server_cpu_s: float, busy_cpu_s: float, gpu_j: float = 0.0) -> Reading:
    return Reading(at_s, cpu_j, gpu_j, "powercap", "measured", server_cpu_s, busy_cpu_s)


def test_a_run_is_cut_out_of_the_readings() -> None:
    readings = [
        reading(0, 0, 0, 0),
        reading(2, 20, 0, 0),  # 10 W when idle
        reading(12, 220, 6, 8),  # 200 J, 100 of them idle; three quarters of the CPU time are the server's
        reading(99, 999, 50, 50),
    ]
    found = metered(readings, start_s=2.0, end_s=12.0)
    assert found and (found.energy_j, found.idle_j, found.active_j, found.allocated_j) == (200, 100, 75, 175)


def test_a_gpu_is_the_servers_alone() -> None:
    readings = [reading(0, 0, 0, 0), reading(2, 20, 0, 0, gpu_j=100), reading(4, 60, 1, 4, gpu_j=900)]
    found = metered(readings, start_s=2.0, end_s=4.0)
    assert found and (found.energy_j, found.idle_j, found.active_j) == (840, 120, 20 / 4 + 700)


def test_lines_of_the_meter_are_read() -> None:
    devices = [
        {"device": "cpu", "source": "powercap", "quality": "measured", "energy_j": 3.0},
        {"device": "gpu:0", "source": "nvml", "quality": "apportioned", "energy_j": 9.0},
    ]
    found = read_line(json.dumps({"time_s": 5.0, "devices": devices}), Processes(psutil.Process()))
    assert (found.at_s, found.cpu_j, found.gpu_j) == (5.0, 3.0, 9.0)
    assert (found.source, found.quality) == ("nvml+powercap", "apportioned")
    assert found.busy_cpu_s > found.server_cpu_s > 0


def test_too_few_readings_are_no_figure() -> None:
    assert metered([reading(0, 0, 0, 0)], 1.0, 2.0) is None
    assert metered([reading(0, 0, 0, 0), reading(1, 9, 1, 1)], 1.0, 2.0) is None


def test_the_listener_is_found_and_its_time_never_falls() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert find_listener(listener.getsockname()[1]).pid == os.getpid()
    processes = Processes(psutil.Process())
    first = processes.cpu_s()
    assert processes.cpu_s() >= first > 0


def test_without_a_listener_it_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LookupError, match="the server's user"):
        find_listener(port)
    meter = MachineMeter(port)
    meter.watch_idle()
    meter.close()
    assert "the server's user" in meter.failure and not meter.readings


def test_it_streams_from_a_process_of_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        meter = MachineMeter(listener.getsockname()[1], interval_s=0.02)
        for _ in range(3000):
            if len(meter.readings) >= 3 or meter.failure:
                break
            time.sleep(0.01)
        meter.close()
    assert len(meter.readings) >= 3, meter.failure
    first, last = meter.readings[0], meter.readings[-1]
    assert last.at_s > first.at_s and last.cpu_j > first.cpu_j and last.server_cpu_s >= first.server_cpu_s
