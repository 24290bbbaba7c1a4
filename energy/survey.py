"""What can be metered on this machine, for a person, a program or a load test. Knows nothing of requests."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from energy.clock import NS_PER_S, Clock
from energy.host import ProcessTree, busy_ns
from energy.meters.base import Meter
from energy.meters.choose import Choice, Finding, MeterSettings, choose_meter
from energy.meters.observe import observe_idle, observe_resolution

_UJ_PER_J = 1_000_000


@dataclass(frozen=True, slots=True)
class Device:
    """One metered device."""

    device: str
    source: str
    quality: str
    resolution_ms: float | None
    """Between two moves of its counter, as seen here and now; None where it did not move."""
    power_w: float | None
    """Mean over half a second."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, and what is missing and why."""

    meter: str
    devices: tuple[Device, ...]
    findings: tuple[Finding, ...]

    def as_json(self) -> str:
        """One document."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """Lines for a person."""
        lines = [self.meter]
        for found in self.devices:
            moves = "does not move" if found.resolution_ms is None else f"moves every {found.resolution_ms:.3g} ms"
            power = "unknown" if found.power_w is None else f"{found.power_w:.2f} W"
            lines.append(f"  {found.device:<6} {found.source:<9} {found.quality:<9} {moves}, now {power}")
        lines += [f"not used: {finding.source}: {finding.detail}" for finding in self.findings if not finding.used]
        return "\n".join(lines)


def survey(settings: MeterSettings, clock: Clock | None = None) -> Survey:
    """Find the meters and watch them for a second."""
    clock = clock or Clock()
    choice = choose_meter(settings, clock)
    power_uw = observe_idle(choice.meter)
    resolution_ns = observe_resolution(choice.meter, clock)
    devices = tuple(
        Device(
            device=reading.device,
            source=reading.source,
            quality=reading.quality.value,
            resolution_ms=resolution_ns[reading.device] / 1e6 if reading.device in resolution_ns else None,
            power_w=power_uw[reading.device] / _UJ_PER_J if reading.device in power_uw else None,
        )
        for reading in choice.meter.read()
    )
    return Survey(choice.meter.name, devices, choice.findings)


def outside(settings: MeterSettings, pid: int | None) -> Choice:
    """Meters for a server that sends no bills.

    Where there is no counter, the estimate counts the CPU time of process ``pid`` and its descendants, or of the whole
    machine; standing power counts in full either way. Raises ``ProcessLookupError``.
    """
    process_ns = busy_ns if pid is None else ProcessTree(pid).cpu_ns
    process_ns()
    return choose_meter(settings, Clock(process_ns=process_ns))


def stream(
    meter: Meter, interval_s: float, clock: Clock | None = None, pause: Callable[[float], None] = time.sleep
) -> Iterator[str]:
    """A line of JSON every ``interval_s``, the first at once: each device's joules since the first.

    Ends, after a line, where ``meter`` has no reading or the process that it watches is gone.
    """
    clock = clock or Clock()
    first = {reading.device: reading.energy_uj for reading in meter.read()}
    due_ns = clock.monotonic_ns()
    while True:
        try:
            readings = meter.read()
        except ProcessLookupError:
            return
        if not readings:
            return
        devices = [
            {
                "device": reading.device,
                "source": reading.source,
                "quality": reading.quality.value,
                "energy_j": (reading.energy_uj - first[reading.device]) / _UJ_PER_J,
            }
            for reading in readings
            if reading.device in first
        ]
        yield json.dumps({"time_s": clock.unix_s(), "devices": devices})
        # From the time that was due, not from now: the lines do not drift.
        due_ns += round(interval_s * NS_PER_S)
        pause(max(0, due_ns - clock.monotonic_ns()) / NS_PER_S)
