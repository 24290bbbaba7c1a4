from itertools import pairwise
from typing import Any

import pytest

from energy.meters.base import Unavailable
from energy.meters.nvml import Nvml, open_nvml
from energy.types import Quality
from tests.energy.fakes import MS, HeldClock


class NVMLError(Exception):
    pass


class Driver:
    """Stands for the module pynvml on a machine with ``len(energy_mj)`` GPUs; None is a GPU without a counter."""

    NVMLError = NVMLError

    def __init__(self, energy_mj: list[int | None], power_mw: int = 0, divided: tuple[int, ...] = ()) -> None:
        self.energy_mj = energy_mj
        self.power_mw = power_mw
        self.divided = divided

    def nvmlInit(self) -> None:
        if not self.energy_mj:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.energy_mj)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.energy_mj):
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        if not self.divided:
            raise NVMLError("Not Supported")
        return int(handle in self.divided), 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        energy_mj = self.energy_mj[handle]
        if energy_mj is None:
            raise NVMLError("Not Supported")
        return energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.power_mw


class TickingDriver(Driver):
    """One GPU at a constant 100 W, whose counter moves every ``tick_ms``."""

    def __init__(self, held: HeldClock, tick_ms: int) -> None:
        super().__init__([0])
        self.held = held
        self.tick_ns = tick_ms * MS
        self.started_ns = held.now_ns
        self.lost_mj = 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        ticks = (self.held.now_ns - self.started_ns) // self.tick_ns
        return ticks * self.tick_ns // (10 * MS) * 1000 - self.lost_mj


def opened(driver: Any, held: HeldClock, *indices: int) -> Nvml:
    meter = open_nvml(indices, held.clock, driver)
    assert isinstance(meter, Nvml)
    return meter


def test_reads_the_energy_counter_of_the_gpus_that_are_asked_for() -> None:
    held, driver = HeldClock(), Driver([500, 1000, 2000])
    meter = opened(driver, held, 1, 2)
    driver.energy_mj = [0, 1007, 2011]
    held.run(ms=100)
    readings = meter.read()
    assert [(reading.device, reading.energy_uj) for reading in readings] == [("gpu:1", 7000), ("gpu:2", 11_000)]
    assert {reading.quality for reading in readings} == {Quality.MEASURED}
    assert {reading.at_ns for reading in readings} == {held.now_ns}


@pytest.mark.parametrize("tick_ms", [1, 20, 100])
@pytest.mark.parametrize("interval_ms", [20, 50, 100])
def test_a_reading_is_of_the_time_when_the_counter_moved(tick_ms: int, interval_ms: int) -> None:
    """However coarse the counter and the looks, energy over time is the power: 100 W."""
    held = HeldClock()
    meter = opened(TickingDriver(held, tick_ms), held, 0)
    seen = []
    for _ in range(60):
        held.run(ms=interval_ms)
        (reading,) = meter.read()
        if not seen or reading.at_ns != seen[-1].at_ns:
            seen.append(reading)
    assert len(seen) > 10
    assert seen[-1].resolution_ns >= min(tick_ms, interval_ms) * MS
    for then, now in pairwise(seen):
        late_ns = min(interval_ms, 100) * MS  # a move is seen by the next look
        expected_uj = (now.at_ns - then.at_ns) // 10
        assert abs(now.energy_uj - then.energy_uj - expected_uj) <= late_ns // 10
    length_ns = seen[-1].at_ns - seen[0].at_ns
    assert (seen[-1].energy_uj - seen[0].energy_uj) * 10 / length_ns == pytest.approx(1, rel=0.06)


def test_between_two_moves_there_is_no_new_reading() -> None:
    held, driver = HeldClock(), Driver([500])
    meter = opened(driver, held, 0)
    opened_at = held.now_ns
    held.run(ms=99)
    (reading,) = meter.read()
    assert (reading.energy_uj, reading.at_ns) == (0, opened_at)
    driver.energy_mj = [600]
    held.run(ms=1)
    (reading,) = meter.read()
    assert (reading.energy_uj, reading.at_ns) == (100_000, held.now_ns)
    # A counter that stands still for long has nothing to count: that is a reading too.
    held.run(ms=200)
    (reading,) = meter.read()
    assert (reading.energy_uj, reading.at_ns) == (100_000, held.now_ns)


def test_a_counter_that_starts_again_never_runs_backwards() -> None:
    held, driver = HeldClock(), Driver([900])
    meter = opened(driver, held, 0)
    for value, expected_uj in ((950, 50_000), (3, 50_000), (5, 52_000)):
        driver.energy_mj = [value]
        held.run(ms=100)
        assert meter.read()[0].energy_uj == expected_uj


def test_without_a_counter_power_is_integrated_and_called_an_estimate() -> None:
    held, driver = HeldClock(), Driver([None], power_mw=40_000)
    meter = opened(driver, held, 0)
    driver.power_mw = 60_000
    held.run(ms=200)
    (reading,) = meter.read()
    assert (reading.energy_uj, reading.quality) == (10_000_000, Quality.ESTIMATED)
    assert meter.name == "NVML: gpu:0 (integrated power)"


def test_no_driver_and_no_such_gpu_are_said() -> None:
    for driver, index, words in ((Driver([]), 0, "Driver Not Loaded"), (Driver([1]), 4, "Invalid Argument")):
        meter = open_nvml([index], HeldClock().clock, driver)
        assert isinstance(meter, Unavailable)
        assert words in meter.reason


def test_gpus_that_cannot_be_read_are_named_beside_those_that_can() -> None:
    driver = Driver([1, 2, 3], divided=(1,))
    meter = open_nvml(None, HeldClock().clock, driver)
    assert isinstance(meter, Nvml)
    assert [reading.device for reading in meter.read()] == ["gpu:0", "gpu:2"]
    assert "gpu:1 not read: it is divided (MIG)" in meter.name
    alone = open_nvml([1], HeldClock().clock, driver)
    assert isinstance(alone, Unavailable) and "MIG" in alone.reason
    partly = open_nvml([0, 7], HeldClock().clock, driver)
    assert isinstance(partly, Nvml) and "gpu:7 not read: Invalid Argument" in partly.name


def test_a_driver_that_goes_away_gives_no_reading() -> None:
    held, driver = HeldClock(), Driver([5])
    meter = opened(driver, held, 0)
    driver.energy_mj = [None]
    held.run(ms=100)
    assert meter.read() == ()
