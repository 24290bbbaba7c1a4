"""Which meter a machine gets, and what is missing for a better one. Knows nothing of requests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from energy.clock import Clock
from energy.meters.base import Combined, Meter, Unavailable
from energy.meters.estimator import Estimator, model_power
from energy.meters.nvml import open_nvml
from energy.meters.powercap import open_powercap

MeterKind = Literal["auto", "nvml", "powercap", "estimate", "none"]


@dataclass(frozen=True, slots=True)
class MeterSettings:
    """What the operator asks for. ``auto`` reads each device in the best way that this machine allows."""

    meter: MeterKind = "auto"
    gpus: tuple[int, ...] | None = ()
    """NVML indices of the GPUs that run steps, None for all; a GPU that runs none is not the service's to bill."""
    powercap_root: Path = Path("/sys/class/powercap")
    watts_per_core: float | None = None
    """For the estimate; None looks the processor up."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of meter that was tried."""

    source: str
    used: bool
    detail: str
    """What it reads, or why it cannot and what would mend that."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The meter to use, and what was found on the way to it."""

    meter: Meter
    findings: tuple[Finding, ...]


def choose_meter(settings: MeterSettings, clock: Clock | None = None) -> Choice:
    """The best meter that is present. A kind asked for by name is never replaced by another."""
    clock = clock or Clock()
    wanted = settings.meter
    if wanted == "none":
        return Choice(Unavailable("switched off in the settings"), ())
    found: list[Meter] = []
    findings: list[Finding] = []

    def add(source: str, meter: Meter) -> bool:
        present = not isinstance(meter, Unavailable)
        findings.append(Finding(source, present, meter.reason if isinstance(meter, Unavailable) else meter.name))
        if present:
            found.append(meter)
        return present

    if wanted == "nvml" or (wanted == "auto" and settings.gpus != ()):
        add("nvml", open_nvml(settings.gpus or None, clock))
    counted = wanted in ("auto", "powercap") and add("powercap", open_powercap(settings.powercap_root, clock))
    if wanted == "estimate" or (wanted == "auto" and not counted):
        add("estimate", Estimator(model_power(settings.watts_per_core), clock))
    if not found:
        return Choice(Unavailable("; ".join(finding.detail for finding in findings)), tuple(findings))
    return Choice(found[0] if len(found) == 1 else Combined(found), tuple(findings))
