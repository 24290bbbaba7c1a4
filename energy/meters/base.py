"""What every meter is. Knows nothing of requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from energy.types import Quality


@dataclass(frozen=True, slots=True)
class Reading:
    """Energy of one metered device, counted from the meter's creation; it never falls."""

    device: str
    """``cpu`` (all packages), ``dram``, or ``gpu:<index>``."""
    source: str
    at_ns: int
    """Monotonic clock."""
    energy_uj: int
    resolution_ns: int
    """The counter moves in steps of this length; 0 where it is continuous."""
    quality: Quality


class Meter(Protocol):
    """A source of readings."""

    @property
    def name(self) -> str:
        """What is read, in words."""

    @property
    def source(self) -> str:
        """The kind of meter: ``powercap``, ``nvml``, ``estimate`` or ``none``."""

    @property
    def idle_uw(self) -> Mapping[str, int]:
        """Idle power by device, in microwatts, for devices of which the meter knows it by construction."""

    def read(self) -> tuple[Reading, ...]:
        """One reading per device that can be read now; a device that cannot be is left out, never zero."""


class Unavailable:
    """No meter: it has no readings and says why."""

    source = "none"

    def __init__(self, reason: str) -> None:
        self.name = f"no meter: {reason}"
        self.reason = reason
        self.idle_uw: Mapping[str, int] = {}

    def read(self) -> tuple[Reading, ...]:
        """Nothing."""
        return ()


class Combined:
    """Meters of different devices side by side."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = tuple(meters)
        self.name = "; ".join(meter.name for meter in self._meters)
        self.source = "+".join(meter.source for meter in self._meters)
        self.idle_uw = {device: power for meter in self._meters for device, power in meter.idle_uw.items()}

    def read(self) -> tuple[Reading, ...]:
        """The readings of all of them."""
        return tuple(reading for meter in self._meters for reading in meter.read())
