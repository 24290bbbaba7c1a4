import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from energy.meters.choose import MeterSettings
from energy.meters.observe import observe_resolution
from energy.survey import outside, stream, survey
from tests.energy.fakes import MS, CountingMeter, HeldClock, write_zone


class Ticking(CountingMeter):
    """A counter that moves every 5 ms; a look takes 1 ms."""

    def read(self):  # type: ignore[no-untyped-def]
        self.held.run(ms=1)
        self.energy_uj = {"cpu": self.held.now_ns // (5 * MS) * 1000, "dram": 7}
        return super().read()


def test_resolution_is_the_time_between_two_moves() -> None:
    held = HeldClock()
    assert observe_resolution(Ticking(held), held.clock) == {"cpu": 5 * MS}


def test_a_machine_without_counters_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = survey(MeterSettings(gpus=None, powercap_root=tmp_path, watts_per_core=5))
    assert [(device.device, device.quality) for device in found.devices] == [
        ("cpu", "estimated"),
        ("dram", "estimated"),
    ]
    assert all(device.power_w is not None and device.power_w > 0 for device in found.devices)
    assert all(device.resolution_ms is not None and device.resolution_ms < 5 for device in found.devices)
    text = found.as_text()
    assert "5 W per core as configured" in text
    assert "not used: nvml: nvidia-ml-py is not installed" in text
    assert f"not used: powercap: {tmp_path} holds no processor package" in text
    document = json.loads(found.as_json())
    assert [finding["source"] for finding in document["findings"]] == ["nvml", "powercap", "estimate"]


def test_a_counter_that_stands_still_is_found_and_said(tmp_path: Path) -> None:
    write_zone(tmp_path / "intel-rapl:0", "package-0", 0)
    found = survey(MeterSettings(powercap_root=tmp_path))
    assert (found.devices[0].resolution_ms, found.devices[0].power_w) == (None, 0)
    assert "does not move, now 0.00 W" in found.as_text()


def test_no_meter_at_all_is_said(tmp_path: Path) -> None:
    found = survey(MeterSettings("powercap", powercap_root=tmp_path))
    assert found.devices == ()
    assert str(tmp_path) in found.as_text()


def test_streams_joules_since_its_start_on_the_beat() -> None:
    held = HeldClock()
    meter = CountingMeter(held, {"cpu": 5_000_000, "gpu:0": 0})

    def pause(seconds: float) -> None:
        held.now_ns += round(seconds * 1e9)
        meter.energy_uj["cpu"] += 250_000

    lines = [json.loads(line) for line in islice(stream(meter, 0.1, held.clock, pause), 3)]
    assert [line["devices"][0]["energy_j"] for line in lines] == [0, 0.25, 0.5]
    assert lines[0]["devices"][1] == {"device": "gpu:0", "source": "powercap", "quality": "measured", "energy_j": 0}
    assert held.now_ns == HeldClock().now_ns + 200 * MS
    meter.broken = True
    assert list(stream(meter, 0.1, held.clock, pause)) == []


def test_another_process_is_watched_with_its_children_until_it_ends() -> None:
    burn = "import sys; [sum(range(1000)) for _ in range(4000)]; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    assert child.stdin is not None and child.stdout is not None
    with child:
        meter = outside(MeterSettings("estimate", watts_per_core=100), child.pid).meter
        before_uj = meter.read()[0].energy_uj
        child.stdout.readline()
        lines = stream(meter, 0.001)
        next(lines)
        assert meter.read()[0].energy_uj > before_uj
        child.stdin.close()
        child.wait()
        assert sum(1 for _ in lines) <= 1
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        outside(MeterSettings("estimate"), child.pid)


def test_a_whole_machine_is_watched_where_no_process_is_named() -> None:
    meter = outside(MeterSettings("estimate"), None).meter
    assert meter.read()[0].energy_uj >= 0
