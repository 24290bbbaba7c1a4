"""The last minutes of an energy account, for whoever watches it. Knows nothing of models or HTTP."""

import threading
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add

from energy.account import MeterTotal, Totals
from energy.clock import Clock
from energy.types import Bill, SettledRecord

INTERVAL_S = 5.0
"""Between two moments that are kept."""
MOMENTS = 121
"""Ten minutes."""
RECENT = 50
BOUNDS_UJ = (*(step * 10**power for power in range(3, 9) for step in (1, 2, 5)), 10**9)
"""Upper ends of the classes of the distribution, 1 mJ to 1 kJ; one class more holds what is above."""


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

    def count(self, bills: Sequence[Bill]) -> None:
        """Count requests that cost so much."""
        self.requests += len(bills)
        for _, _, allocated_uj, gco2e, _, _, _ in bills:
            if allocated_uj is None or gco2e is None:
                self.unknown += 1
            else:
                self.allocated_uj += allocated_uj
                self.gco2e += gco2e
                self.counts[bisect_left(BOUNDS_UJ, allocated_uj)] += 1

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
        self._recent: deque[SettledRecord] = deque(maxlen=RECENT)

    def settled(self, records: Iterable[SettledRecord]) -> None:
        """Count bills."""
        shown = [record for record in records if record.request.status != "refused"]
        bills: defaultdict[tuple[str | None, str], list[Bill]] = defaultdict(list)
        for request, bill, _, _ in shown:
            bills[request.key, request.task].append(bill)
        with self._lock:
            self._recent.extendleft(shown[-RECENT:])
            for whose, their_bills in bills.items():
                self._sums.setdefault(whose, TaskSums()).count(their_bills)

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
            recent = tuple(record for record in self._recent if only in (None, record.request.key))
            return View(self._began_s, self._meters, tuple(self._moments), tasks, recent)
