from pathlib import Path

import pytest

from energy.meters.estimator import DEFAULT_WATTS_PER_CORE, Estimator, PowerModel, model_power
from energy.types import Quality
from tests.energy.fakes import HeldClock


def cpuinfo(name: str, cores: int, sockets: int = 1, flags: str = "fpu avx2") -> str:
    return "\n".join(
        f"processor\t: {core}\nmodel name\t: {name}\nphysical id\t: {core % sockets}\nflags\t\t: {flags}\n"
        for core in range(cores)
    )


def model_of(tmp_path: Path, text: str) -> PowerModel:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    return model_power(cpuinfo=path)


def test_energy_is_cpu_time_and_standing_power() -> None:
    held = HeldClock()
    # 3.5 W per core of which 0.74 W are idle: 2.76 W for each second of CPU time.
    meter = Estimator(PowerModel(watts_per_core=3.5, cores=2, memory_gb=10, basis="a test"), held.clock)
    held.run(ms=1000, cpu_ms=500)
    cpu, dram = meter.read()
    assert (cpu.device, cpu.energy_uj) == ("cpu", 2 * 740_000 + 1_380_000)
    assert (dram.device, dram.energy_uj) == ("dram", 3_920_000)
    assert {cpu.quality, dram.quality} == {Quality.ESTIMATED}
    assert meter.idle_uw == {"cpu": 1_480_000, "dram": 3_920_000}


@pytest.mark.parametrize(
    ("name", "cores", "sockets", "watts_per_core"),
    [
        ("AMD EPYC 7763 64-Core Processor", 128, 1, 280 / 128),
        ("AMD EPYC 7763 64-Core Processor", 256, 2, 280 / 128),
        ("Intel(R) Xeon(R) CPU E5-4650 v4 @ 2.20GHz", 28, 1, 105 / 28),
        ("Intel(R) Core(TM) i7-7500U CPU @ 2.70GHz", 4, 1, 15 / 4),
        ("13th Gen Intel(R) Core(TM) i5-1345URE", 12, 1, 15 / 12),
        ("AMD Ryzen 5 PRO 8645HS w/ Radeon 760M Graphics", 12, 1, 45 / 12),
    ],
)
def test_a_known_processor_at_full_load_takes_its_tdp(
    tmp_path: Path, name: str, cores: int, sockets: int, watts_per_core: float
) -> None:
    model = model_of(tmp_path, cpuinfo(name, cores, sockets))
    assert model.watts_per_core == watts_per_core
    assert "TDP" in model.basis


def test_an_unknown_processor_and_a_virtual_machine_get_the_default(tmp_path: Path) -> None:
    unknown = cpuinfo("Abacus 3000", 4)
    virtual = cpuinfo("AMD EPYC 7763 64-Core Processor", 2, flags="fpu hypervisor avx2")
    for text in (unknown, virtual, ""):
        model = model_of(tmp_path, text)
        assert model.watts_per_core == DEFAULT_WATTS_PER_CORE
        assert "default" in model.basis


def test_configured_watts_overrule_the_table(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo("AMD EPYC 7763 64-Core Processor", 128))
    model = model_power(watts_per_core=7.5, cpuinfo=path)
    assert (model.watts_per_core, model.basis) == (7.5, "7.5 W per core as configured")
