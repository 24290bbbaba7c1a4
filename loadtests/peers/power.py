"""Joules of a sample, by one method for every side. Knows nothing of what ran.

Where the package counters of Linux powercap can be read, their difference. Elsewhere an estimate:

    energy = CPU seconds of the measured processes x (watts of a busy core - its idle watts)
             + elapsed seconds x idle watts x cores

with the constants of Cloud Carbon Footprint (methodology, Appendix I: average of AWS's processors).
"""

from dataclasses import dataclass
from pathlib import Path

CORE_BUSY_W = 3.5
CORE_IDLE_W = 0.74
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Energy:
    """Joules, and where they come from."""

    joules: float
    quality: str
    """``measured`` or ``estimated``."""


def estimated_j(cpu_s: float, elapsed_s: float, cores: int) -> float:
    """The formula above."""
    return cpu_s * (CORE_BUSY_W - CORE_IDLE_W) + elapsed_s * CORE_IDLE_W * cores


class Meter:
    """Energy since its making."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._root, self._start = root, _counters(root)

    def energy(self, cpu_s: float, elapsed_s: float, cores: int) -> Energy:
        """Of the sample that ends now; a counter covers the whole machine, whoever computes."""
        now = _counters(self._root)
        if self._start and now.keys() == self._start.keys():
            spans = {name: (value - self._start[name][0]) % span for name, (value, span) in now.items()}
            return Energy(sum(spans.values()) / 1e6, "measured")
        return Energy(estimated_j(cpu_s, elapsed_s, cores), "estimated")


def _counters(root: Path) -> dict[str, tuple[int, int]]:
    """Microjoules and the range of each package's counter; none where one of them cannot be read."""
    found = {}
    try:
        for zone in root.glob("*"):
            if (zone / "name").is_file() and (zone / "name").read_text().startswith("package-"):
                span = int((zone / "max_energy_range_uj").read_text())
                found[zone.name] = (int((zone / "energy_uj").read_text()), span)
    except OSError:
        return {}
    return found
