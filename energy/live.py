"""The last minutes of an energy account, for whoever watches it. Knows nothing of models or HTTP."""

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import add

import numpy as np

from energy.account import MeterTotal, Totals
from energy.clock import Clock
from energy.types import Bills, SettledRecord

INTERVAL_S = 5.0
"""Between two moments that are kept."""
MOMENTS = 121
"""Ten minutes."""
RECENT = 50
BOUNDS_UJ = (*(step * 10**power for power in range(3, 9) for step in (1, 2, 5)), 10**9)
"""Upper ends of the classes of the distribution, 1 mJ to 1 kJ; one class more holds what is above."""
_BOUNDS_UJ = np.array(BOUNDS_UJ)


@dataclass(frozen=True, slots=True)
class Moment:
    """The account's counters at one time, in microjoules since it was opened."""

    time_s: float
    """Since 1970."""
    metered_uj: int
    by_task_uj: Mapping[str, int]
    unattributed_uj: Mapping[str, int]
    """By reason."""


@dataclass(slots=True)
class TaskSums:
    """What the requests of one task have cost."""

    requests: int = 0
    unknown: int = 0
    """Those among them whose bill is unavailable; the sums leave them out."""
    allocated_uj: int = 0
    gco2e: float = 0.0
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_UJ) + 1))
    """Requests by class of allocated energy, see ``BOUNDS_UJ``."""

    def count(self, bills: Bills) -> None:
        """Count requests that cost so much."""
        self.requests += len(bills)
        if bills.allocated_uj is None or bills.gco2e is None:
            self.unknown += len(bills)
            return
        self.allocated_uj += int(bills.allocated_uj.sum())
        self.gco2e += float(bills.gco2e.sum())
        classes = np.searchsorted(_BOUNDS_UJ, bills.allocated_uj)
        self.counts = list(map(add, self.counts, np.bincount(classes, minlength=len(self.counts)).tolist()))

    def add(self, other: "TaskSums") -> None:
        """Count the requests of ``other`` too."""
        self.requests += other.requests
        self.unknown += other.unknown
        self.allocated_uj += other.allocated_uj
        self.gco2e += other.gco2e
        self.counts = list(map(add, self.counts, other.counts))


@dataclass(frozen=True, slots=True)
class View:
    """One consistent look."""

    began_s: float
    meters: tuple[MeterTotal, ...]
    moments: tuple[Moment, ...]
    """Of everybody together, oldest first."""
    tasks: Mapping[str, TaskSums]
    recent: tuple[SettledRecord, ...]
    """Newest first."""


class Live:
    """Keeps what a dashboard shows; its methods may be called from any thread. Requests that were refused before a
    model ran are left out."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._began_s = self._clock.unix_s()
        self._meters: tuple[MeterTotal, ...] = ()
        self._moments: deque[Moment] = deque(maxlen=MOMENTS)
        self._sums: dict[tuple[str | None, str], TaskSums] = {}
        """By key and task."""
        self._recent: deque[tuple[Bills, int]] = deque(maxlen=RECENT)
        """Newest first; which it is of bills that are alike."""

    def settled(self, bills: Iterable[Bills]) -> None:
        """Count bills."""
        shown = [each for each in bills if each.status != "refused"]
        latest = [(each, number) for each in shown for number in range(len(each))[-RECENT:]]
        latest.sort(key=lambda one: one[0].times_s[one[1]])
        with self._lock:
            self._recent.extendleft(latest)
            for each in shown:
                self._sums.setdefault((each.key, each.task), TaskSums()).count(each)

    def tick(self, totals: Totals) -> None:
        """Keep the account's counters, unless the last ones are younger than the interval."""
        now_s = self._clock.unix_s()
        by_task: Counter[str] = Counter()
        for share in totals.attributed:
            by_task[share.task] += share.energy_uj
        unattributed: Counter[str] = Counter()
        for rest in totals.unattributed:
            unattributed[rest.reason.value] += rest.energy_uj
        metered_uj = sum(meter.settled_uj + meter.open_uj + meter.residual_uj for meter in totals.meters)
        with self._lock:
            self._meters = totals.meters
            if not self._moments or abs(now_s - self._moments[-1].time_s) >= INTERVAL_S:
                self._moments.append(Moment(now_s, metered_uj, by_task, unattributed))

    def view(self, only: str | None = None) -> View:
        """What is kept now; sums and requests of the key ``only`` alone, where one is named."""
        tasks: dict[str, TaskSums] = {}
        with self._lock:
            for (key, task), sums in self._sums.items():
                if only in (None, key):
                    tasks.setdefault(task, TaskSums()).add(sums)
            recent = tuple(bills[number] for bills, number in self._recent if only in (None, bills.key))
            return View(self._began_s, self._meters, tuple(self._moments), tasks, recent)
