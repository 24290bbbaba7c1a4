from typing import Any

from energy.meters.base import Unavailable
from energy.meters.nvml import Nvml, open_nvml
from energy.types import Quality
from tests.energy.fakes import HeldClock


class NVMLError(Exception):
    pass


class Driver:
    """Stands for the module pynvml on a machine with ``len(energy_mj)`` GPUs; None is a GPU without a counter."""

    NVMLError = NVMLError

    def __init__(self, energy_mj: list[int | None], power_mw: int = 0) -> None:
        self.energy_mj = energy_mj
        self.power_mw = power_mw
        self.calls = 0

    def nvmlInit(self) -> None:
        if not self.energy_mj:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.energy_mj):
            raise NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self.calls += 1
        energy_mj = self.energy_mj[handle]
        if energy_mj is None:
            raise NVMLError("Not Supported")
        return energy_mj

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.power_mw


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


def test_asks_the_driver_no_more_often_than_its_counter_moves() -> None:
    held, driver = HeldClock(), Driver([500])
    meter = opened(driver, held, 0)
    opened_at = held.now_ns
    driver.energy_mj = [600]
    held.run(ms=99)
    (reading,) = meter.read()
    assert (reading.energy_uj, reading.at_ns, driver.calls) == (0, opened_at, 1)
    held.run(ms=1)
    assert meter.read()[0].energy_uj == 100_000
    assert driver.calls == 2


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


def test_a_driver_that_goes_away_gives_no_reading() -> None:
    held, driver = HeldClock(), Driver([5])
    meter = opened(driver, held, 0)
    driver.energy_mj = [None]
    held.run(ms=100)
    assert meter.read() == ()
