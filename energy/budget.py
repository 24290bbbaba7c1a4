"""What each key has spent of its joules for the day. Knows nothing of HTTP, nor of how a bill comes about.

Days are those of UTC. A bill counts when it is settled, so requests that run at the same time may together pass a
limit; none begins after it.
"""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from energy.clock import Clock
from energy.types import Bills

EVERYONE = ""
"""The key of a limit on all requests together."""
_S_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a key stands today."""

    limit_uj: int
    spent_uj: int
    resets_in_s: float
    """Until the day ends."""

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self.spent_uj >= self.limit_uj


class DailyBudgets:
    """What keys have spent today, in microjoules of allocated energy; its methods may be called from any thread."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._day = self.day
        self._spent_uj: Counter[str] = Counter()

    @property
    def day(self) -> int:
        """Today, counted from 1970."""
        return int(self._clock.unix_s() // _S_PER_DAY)

    @property
    def day_began_s(self) -> float:
        """Seconds from 1970 to the beginning of today."""
        return float(self.day * _S_PER_DAY)

    def spend(self, key: str, energy_uj: int, time_s: float) -> None:
        """Count what was spent at ``time_s`` (seconds since 1970), unless that was on another day."""
        with self._lock:
            self._turn()
            if time_s // _S_PER_DAY == self._day:
                self._spent_uj[key] += energy_uj

    def settled(self, bills: Iterable[Bills]) -> None:
        """Count bills for everyone and for their keys; those that are not known count nothing."""
        with self._lock:
            self._turn()
            began_s, ends_s = self._day * _S_PER_DAY, (self._day + 1) * _S_PER_DAY
            for each in bills:
                if each.allocated_uj is None:
                    continue
                is_today = (each.times_s >= began_s) & (each.times_s < ends_s)
                spent_uj = int(each.allocated_uj[is_today].sum())
                self._spent_uj[EVERYONE] += spent_uj
                if each.key is not None:
                    self._spent_uj[each.key] += spent_uj

    def standing(self, key: str, limit_uj: int) -> Standing:
        """Where a key stands that may spend ``limit_uj`` in a day."""
        with self._lock:
            self._turn()
            resets_in_s = (self._day + 1) * _S_PER_DAY - self._clock.unix_s()
            return Standing(limit_uj, self._spent_uj[key], resets_in_s)

    def _turn(self) -> None:
        """Begin a new day, if it has come."""
        if self.day != self._day:
            self._day = self.day
            self._spent_uj.clear()
