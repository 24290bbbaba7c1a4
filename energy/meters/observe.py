"""Watches a meter for a while: what its devices take at rest, and how finely they count. Knows nothing of requests."""

import time
from statistics import median

from energy.clock import NS_PER_S, Clock
from energy.meters.base import Meter, Reading


def observe_idle(meter: Meter, seconds: float = 0.5) -> dict[str, int]:
    """Mean power of each device in microwatts while the caller does nothing."""
    before = {reading.device: reading for reading in meter.read()}
    time.sleep(seconds)
    idle_uw = {}
    for now in meter.read():
        then = before.get(now.device)
        if then is not None and now.at_ns > then.at_ns:
            idle_uw[now.device] = (now.energy_uj - then.energy_uj) * NS_PER_S // (now.at_ns - then.at_ns)
    return idle_uw


def observe_resolution(meter: Meter, clock: Clock, seconds: float = 0.5) -> dict[str, int]:
    """Nanoseconds between two moves of each device's counter, the median, seen by looking without a pause.

    A device whose counter did not move twice is left out; one that moves with every look is as fine as looking is
    fast.
    """
    gaps_ns: dict[str, list[int]] = {}
    last: dict[str, Reading] = {}
    end_ns = clock.monotonic_ns() + round(seconds * NS_PER_S)
    while clock.monotonic_ns() < end_ns:
        for reading in meter.read():
            then = last.setdefault(reading.device, reading)
            if reading.energy_uj != then.energy_uj:
                gaps_ns.setdefault(reading.device, []).append(reading.at_ns - then.at_ns)
                last[reading.device] = reading
    # Watching began in the middle of the first gap.
    return {device: round(median(gaps[1:])) for device, gaps in gaps_ns.items() if len(gaps) > 1}
