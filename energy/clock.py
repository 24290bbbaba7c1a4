"""The clocks that the energy account reads, in one place so that tests can hold them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic time for durations, CPU time of this process over all its threads, wall time for records."""

    monotonic_ns: Callable[[], int] = time.monotonic_ns
    process_ns: Callable[[], int] = time.process_time_ns
    unix_s: Callable[[], float] = time.time
