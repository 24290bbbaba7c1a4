import sys
from pathlib import Path

import pytest

from energy.meters.choose import Finding, MeterSettings, choose_meter
from tests.energy.fakes import write_zone


def found(choice_findings: tuple[Finding, ...]) -> list[tuple[str, bool]]:
    return [(finding.source, finding.used) for finding in choice_findings]


@pytest.fixture
def rapl(tmp_path: Path) -> Path:
    write_zone(tmp_path / "rapl" / "intel-rapl:0", "package-0", 0)
    return tmp_path / "rapl"


@pytest.fixture
def no_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_auto_takes_the_counter_where_there_is_one(rapl: Path) -> None:
    choice = choose_meter(MeterSettings(powercap_root=rapl))
    assert choice.meter.source == "powercap"
    assert found(choice.findings) == [("powercap", True)]


def test_auto_falls_back_to_the_estimate_and_says_what_is_missing(tmp_path: Path) -> None:
    choice = choose_meter(MeterSettings(powercap_root=tmp_path))
    assert choice.meter.source == "estimate"
    assert found(choice.findings) == [("powercap", False), ("estimate", True)]
    assert str(tmp_path) in choice.findings[0].detail


def test_a_gpu_that_cannot_be_read_is_said_and_the_processor_still_metered(rapl: Path, no_pynvml: None) -> None:
    choice = choose_meter(MeterSettings(gpus=(0,), powercap_root=rapl))
    assert choice.meter.source == "powercap"
    assert found(choice.findings) == [("nvml", False), ("powercap", True)]
    assert "[gpu]" in choice.findings[0].detail


def test_a_meter_asked_for_by_name_is_never_replaced(tmp_path: Path, no_pynvml: None) -> None:
    for wanted in (MeterSettings("powercap", powercap_root=tmp_path), MeterSettings("nvml")):
        choice = choose_meter(wanted)
        assert (choice.meter.source, choice.meter.read()) == ("none", ())
        assert choice.findings[0].detail in choice.meter.name


def test_none_is_no_meter() -> None:
    choice = choose_meter(MeterSettings("none"))
    assert choice.meter.name == "no meter: switched off in the settings"


def test_the_estimate_takes_the_configured_watts() -> None:
    choice = choose_meter(MeterSettings("estimate", watts_per_core=5))
    assert choice.meter.name == "estimate: 5 W per core as configured"
