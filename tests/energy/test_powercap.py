import os
import pwd
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.meters.base import Unavailable
from energy.meters.powercap import Powercap, open_powercap
from energy.types import Quality
from tests.energy.fakes import MS, HeldClock, write_zone


def opened(root: Path) -> Powercap:
    meter = open_powercap(root, HeldClock().clock)
    assert isinstance(meter, Powercap)
    return meter


def energies(meter: Powercap) -> dict[str, int]:
    return {reading.device: reading.energy_uj for reading in meter.read()}


def set_uj(zone: Path, energy_uj: int) -> None:
    (zone / "energy_uj").write_text(f"{energy_uj}\n")


def test_counts_from_its_creation_and_wraps_around(tmp_path: Path) -> None:
    package = write_zone(tmp_path / "intel-rapl:0", "package-0", 999_000, range_uj=1_000_000)
    meter = opened(tmp_path)
    assert energies(meter) == {"cpu": 0}
    set_uj(package, 999_900)
    assert energies(meter) == {"cpu": 900}
    set_uj(package, 400)
    assert energies(meter) == {"cpu": 1400}


@given(st.lists(st.integers(0, 999), max_size=40), st.integers(0, 999))
def test_wrapped_counters_count_as_unwrapped_ones_do(steps: list[int], start: int) -> None:
    with TemporaryDirectory() as folder:
        wrapped = write_zone(Path(folder, "a", "intel-rapl:0"), "package-0", start, range_uj=1000)
        plain = write_zone(Path(folder, "b", "intel-rapl:0"), "package-0", start, range_uj=10**9)
        meters = opened(wrapped.parent), opened(plain.parent)
        total = start
        for step in steps:
            total += step
            set_uj(wrapped, total % 1000)
            set_uj(plain, total)
            assert energies(meters[0]) == energies(meters[1]) == {"cpu": total - start}


def test_a_reading_says_what_it_is(tmp_path: Path) -> None:
    write_zone(tmp_path / "intel-rapl:0", "package-0", 5)
    (reading,) = opened(tmp_path).read()
    assert (reading.device, reading.source, reading.resolution_ns) == ("cpu", "powercap", MS)
    assert (reading.quality, reading.at_ns) == (Quality.MEASURED, HeldClock().now_ns)


def test_sums_packages_and_their_memory_but_neither_psys_nor_cores(tmp_path: Path) -> None:
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0/intel-rapl:0:0": "core",
        "intel-rapl:0/intel-rapl:0:1": "uncore",
        "intel-rapl:0/intel-rapl:0:2": "dram",
        "intel-rapl:1": "package-1-die-0",
        "intel-rapl:1/intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
    }
    paths = [write_zone(tmp_path / path, name, 1000) for path, name in zones.items()]
    # In /sys/class/powercap every zone also stands beside the others, as a link.
    (tmp_path / "intel-rapl:0:2").symlink_to(tmp_path / "intel-rapl:0" / "intel-rapl:0:2")
    meter = opened(tmp_path)
    for power, path in enumerate(paths):
        set_uj(path, 1000 + 10**power)
    assert energies(meter) == {"cpu": 1 + 10_000, "dram": 1000 + 100_000}
    assert meter.name == "RAPL through powercap: 2 packages, with memory"


def test_a_package_listed_under_two_control_types_counts_once(tmp_path: Path) -> None:
    both = [write_zone(tmp_path / f"{kind}:0", "package-0", 0) for kind in ("intel-rapl-mmio", "intel-rapl")]
    meter = opened(tmp_path)
    for zone in both:
        set_uj(zone, 70)
    assert energies(meter) == {"cpu": 70}


def test_missing_memory_is_said(tmp_path: Path) -> None:
    write_zone(tmp_path / "intel-rapl:0", "package-0", 0)
    assert opened(tmp_path).name.endswith("1 package, without memory, which this processor does not count")


def test_a_counter_that_vanishes_gives_no_reading_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = write_zone(tmp_path / "intel-rapl:0", "package-0", 100)
    meter = opened(tmp_path)
    (package / "energy_uj").write_text("")
    assert meter.read() == ()
    assert meter.read() == ()
    assert len(caplog.records) == 1
    set_uj(package, 150)
    assert energies(meter) == {"cpu": 50}
    assert "is read again" in caplog.text


@pytest.mark.parametrize("make_root", [True, False])
def test_without_packages_the_reason_names_the_ways_out(tmp_path: Path, make_root: bool) -> None:
    root = tmp_path / "powercap"
    if make_root:
        write_zone(root / "intel-rapl:0", "psys", 0)
    meter = open_powercap(root, HeldClock().clock)
    assert isinstance(meter, Unavailable)
    assert str(root) in meter.reason and "powercap_root" in meter.reason
    assert meter.read() == ()


def test_a_counter_for_root_only_says_how_to_mend_that(tmp_path: Path) -> None:
    package = write_zone(tmp_path / "intel-rapl:0", "package-0", 0)
    (package / "energy_uj").chmod(0)
    meter = as_nobody(tmp_path)
    assert isinstance(meter, Unavailable)
    assert "sudo chmod a+r" in meter.reason and "energy_uj" in meter.reason


def as_nobody(root: Path) -> Powercap | Unavailable:
    """Open without root's right to read everything."""
    if os.geteuid() != 0:
        return open_powercap(root, HeldClock().clock)
    for folder in (root, *root.parents):
        if folder.stat().st_uid == 0 and "pytest" in folder.name:
            folder.chmod(0o755)
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        return open_powercap(root, HeldClock().clock)
    finally:
        os.seteuid(0)
