"""Processor packages and memory through Linux powercap (RAPL). Knows nothing of requests."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from energy.clock import Clock
from energy.meters.base import Reading, Unavailable
from energy.types import Quality

_log = logging.getLogger(__name__)
_ZONE = re.compile(r"(?P<kind>.+?):\d+(:\d+)?")
RESOLUTION_NS = 1_000_000
"""RAPL counters are updated about every millisecond."""


@dataclass(slots=True)
class _Zone:
    device: str
    descriptor: int
    """Of its counter: held until the process ends, for opening it anew costs more than reading it."""
    range_uj: int
    last_uj: int
    total_uj: int = 0

    def advance(self) -> None:
        now_uj = int(os.pread(self.descriptor, 32, 0))
        # The counter starts again at its range; the difference is right as long as it wraps once between reads.
        self.total_uj += (now_uj - self.last_uj) % self.range_uj
        self.last_uj = now_uj


class Powercap:
    """The sum of all ``package-*`` zones as ``cpu`` and of their ``dram`` zones as ``dram``."""

    source = "powercap"

    def __init__(self, zones: list[_Zone], clock: Clock) -> None:
        self._zones = zones
        self._clock = clock
        self._failing = False
        self.idle_uw: Mapping[str, int] = {}
        self.devices = tuple(device for device in ("cpu", "dram") if any(z.device == device for z in zones))
        dies = sum(zone.device == "cpu" for zone in zones)
        memory = "with memory" if "dram" in self.devices else "without memory, which this processor does not count"
        self.name = f"RAPL through powercap: {dies} package{'s' if dies > 1 else ''}, {memory}"

    def read(self) -> tuple[Reading, ...]:
        """Readings of all zones, or none at all: a sum over some of them would run backwards."""
        try:
            for zone in self._zones:
                zone.advance()
        except (OSError, ValueError) as error:
            if not self._failing:
                _log.warning("powercap cannot be read any more: %s", error)
            self._failing = True
            return ()
        if self._failing:
            _log.warning("powercap is read again")
        self._failing = False
        at_ns = self._clock.monotonic_ns()
        return tuple(
            Reading(
                device=device,
                source=self.source,
                at_ns=at_ns,
                energy_uj=sum(zone.total_uj for zone in self._zones if zone.device == device),
                resolution_ns=RESOLUTION_NS,
                quality=Quality.MEASURED,
            )
            for device in self.devices
        )


def open_powercap(root: Path, clock: Clock) -> Powercap | Unavailable:
    """The meter of the powercap tree at ``root``, or why there is none and how to mend that."""
    try:
        zones = [_open_zone(device, folder) for device, folder in _find_zones(root)]
    except PermissionError as error:
        return Unavailable(
            f"{error.filename} may be read by root only (so since Linux 5.10); "
            f"grant it with: sudo chmod a+r {root}/*/energy_uj {root}/*/*/energy_uj"
        )
    except (OSError, ValueError) as error:
        return Unavailable(f"{root} cannot be read: {error}")
    if not zones:
        return Unavailable(
            f"{root} holds no processor package: a virtual machine without RAPL, a container "
            f"(mount the host's tree and set powercap_root), or a kernel without the module intel_rapl_msr"
        )
    return Powercap(zones, clock)


def _open_zone(device: str, folder: Path) -> _Zone:
    range_uj = int((folder / "max_energy_range_uj").read_bytes())
    descriptor = os.open(folder / "energy_uj", os.O_RDONLY | os.O_CLOEXEC)
    return _Zone(device, descriptor, range_uj, int(os.pread(descriptor, 32, 0)))


def _find_zones(root: Path) -> list[tuple[str, Path]]:
    """``(device, folder)`` of every package and of the memory below it.

    ``psys`` holds the packages, and ``core`` and ``uncore`` are held by them: summed, they would count twice.
    So would packages that the kernel lists under two control types (``intel-rapl`` and ``intel-rapl-mmio``).
    """
    if not root.is_dir():
        return []
    packages: dict[str, list[Path]] = {}
    for folder in sorted(root.iterdir()):
        zone = _ZONE.fullmatch(folder.name)
        if zone and _name(folder).startswith("package-"):
            packages.setdefault(zone["kind"], []).append(folder)
    if not packages:
        return []
    found = []
    for package in packages.get("intel-rapl") or next(iter(packages.values())):
        found.append(("cpu", package))
        found += [("dram", child) for child in sorted(package.glob(f"{package.name}:*")) if _name(child) == "dram"]
    return found


def _name(folder: Path) -> str:
    try:
        return (folder / "name").read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
