from pathlib import Path

import pytest

from loadtests.peers.power import Energy, Meter, estimated_j


def test_busy_cores_and_the_idle_machine_are_counted() -> None:
    assert estimated_j(cpu_s=2.0, elapsed_s=1.0, cores=4) == pytest.approx(2 * (3.5 - 0.74) + 4 * 0.74)


def test_without_a_counter_it_is_an_estimate(tmp_path: Path) -> None:
    assert Meter(tmp_path).energy(2.0, 1.0, 4) == Energy(estimated_j(2.0, 1.0, 4), "estimated")


def test_counters_of_packages_are_read_and_unwrapped(tmp_path: Path) -> None:
    for zone, name, before in (("a", "package-0", 90), ("b", "package-1", 10), ("c", "core", 5)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(name + "\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("100\n")
        (tmp_path / zone / "energy_uj").write_text(f"{before}\n")
    meter = Meter(tmp_path)
    (tmp_path / "a" / "energy_uj").write_text("20\n")
    (tmp_path / "b" / "energy_uj").write_text("15\n")
    (tmp_path / "c" / "energy_uj").write_text("95\n")
    assert meter.energy(0, 0, 1) == Energy(35e-6, "measured")
