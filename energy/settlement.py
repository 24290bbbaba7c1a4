"""Readings of one metered device cut into windows, from which steps take their energy. Knows nothing of requests.

Between two readings lies a *window*. Its energy has two parts: idle, what the device would have taken anyway, and
active, the rest. A step takes from each window that it overlaps

* of the idle part: the fraction of the window that it lasted, divided by the number of executors on the device;
  work beside the executors takes none;
* of the active part: its share of the load. On a processor, load is CPU time, of this process and of others, so
  that steps which overlap in time, the service's own work between steps and other programs are told apart. A GPU
  runs one step at a time, so there the steps share all of it by their duration.

A counter that has not moved in a window is taken for one that stands still, as some virtual machines show one: what
the steps of that window took is not known, rather than nothing.

What no step has taken when a window expires is unattributed, for a reason. Nothing is ever made or lost: everything
is integer microjoules, and each is taken once.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from energy.clock import NS_PER_S
from energy.meters.base import Reading
from energy.types import Quality

HORIZON_NS = 10 * NS_PER_S
"""How long a window waits for steps that began in it: longer than any step."""
IDLE_WINDOW_NS = NS_PER_S // 2
"""The mean power over a window at least this long may become the idle power, where it is the lowest seen."""


class Reason(StrEnum):
    """Why energy is on no request's bill."""

    IDLE = "idle"
    WARM_UP = "warm_up"
    """Steps without requests."""
    OVERHEAD = "overhead"
    """The service's own CPU time outside of steps: HTTP, checking the files of models and moving their weights into
    large pages, metering."""
    OTHER_PROCESSES = "other_processes"
    UNRESOLVED = "unresolved"


@dataclass(slots=True, eq=False)
class Stretch:
    """One step, or several that are charged together."""

    started_ns: int
    ended_ns: int
    """The first began and the last ended then."""
    cpu_ns: int
    """Of all together."""
    time_ns: int
    """On an executor, of all together; none where they ran beside them."""
    steps: int


class Claim(NamedTuple):
    """The energy of a stretch on one device."""

    idle_uj: int
    active_uj: int
    quality: Quality


@dataclass(slots=True)
class _Window:
    start_ns: int
    end_ns: int
    owned: bool
    """Whether its idle energy is this process's."""
    still: bool
    """Whether a counter did not move in it."""
    idle_uj: int
    """Of the whole window."""
    idle_left_uj: int
    active_left_uj: int
    load_ns: int
    """On a processor, of the whole window."""
    load_left_ns: int
    others_ns: int

    @property
    def length_ns(self) -> int:
        """How long it lasted."""
        return self.end_ns - self.start_ns

    def overlap_ns(self, stretch: Stretch) -> int:
        """How long of that a stretch lasted; not positive where that is none."""
        return min(self.end_ns, stretch.ended_ns) - max(self.start_ns, stretch.started_ns)

    def share_active(self, loads_ns: Sequence[int]) -> list[int]:
        """Of its active energy, what falls to so much of its load each."""
        shares_uj = []
        whole_ns = max(self.load_left_ns, sum(loads_ns))
        for load_ns in loads_ns:
            share_uj = self.active_left_uj * load_ns // whole_ns if whole_ns else 0
            shares_uj.append(share_uj)
            self.active_left_uj -= share_uj
            whole_ns -= load_ns
        self.load_left_ns = whole_ns
        return shares_uj


class Channel:
    """The windows of one metered device: a ring as long as ``HORIZON_NS``.

    ``first`` is the reading from which on is counted, ``idle_uw`` the idle power: fixed where ``idle_known``, else
    the lowest seen. ``executors`` share the device.
    """

    def __init__(self, first: Reading, process_ns: int, idle_uw: int, idle_known: bool, executors: int) -> None:
        self.device = first.device
        self.source = first.source
        self.quality = first.quality
        self.inferred = Quality.APPORTIONED if first.quality is Quality.MEASURED else first.quality
        """Of what no window measures."""
        self.idle_uw = idle_uw
        self.by_cpu_time = not first.device.startswith("gpu:")
        self.shared_with_others = self.by_cpu_time and first.quality is not Quality.ESTIMATED
        self.is_continuous = first.resolution_ns == 0
        self._executors = executors if self.by_cpu_time else 1
        self._idle_known = idle_known
        self._first_uj = first.energy_uj
        self._last = first
        self._last_process_ns = process_ns
        self._windows: deque[_Window] = deque()

    @property
    def meter_uj(self) -> int:
        """What the meter has counted so far."""
        return self._last.energy_uj - self._first_uj

    @property
    def read_ns(self) -> int:
        """When the meter was last read."""
        return self._last.at_ns

    @property
    def window_ns(self) -> int:
        """How long a step must last for readings to tell what it took: as long as the latest window. No reading of an
        estimate does."""
        if self.is_continuous:
            return HORIZON_NS
        return self._windows[-1].length_ns if self._windows else 0

    @property
    def open_uj(self) -> int:
        """What lies in windows and may yet be taken."""
        return sum(window.idle_left_uj + window.active_left_uj for window in self._windows)

    def advance(self, reading: Reading, process_ns: int, others_ns: int, owned: bool = True) -> None:
        """Close the window that ends with ``reading``, unless the counter cannot have moved yet.

        ``others_ns`` is the CPU time of other processes during the window, where the meter counts them too.
        ``owned`` is whether the device's idle energy is for this process to bill.
        """
        length_ns = reading.at_ns - self._last.at_ns
        if length_ns <= 0 or length_ns < reading.resolution_ns:
            return
        energy_uj = reading.energy_uj - self._last.energy_uj
        if not self._idle_known and length_ns >= IDLE_WINDOW_NS:
            self.idle_uw = min(self.idle_uw, energy_uj * NS_PER_S // length_ns)
        # Rounded up, or what only idles would have a microjoule above it now and then, for all requests to share.
        idle_uj = min(energy_uj, -(-self.idle_uw * length_ns // NS_PER_S))
        load_ns = process_ns - self._last_process_ns + others_ns if self.by_cpu_time else 0
        still = energy_uj == 0 and reading.resolution_ns > 0
        active_uj = energy_uj - idle_uj
        self._windows.append(
            _Window(
                self._last.at_ns, reading.at_ns, owned, still, idle_uj, idle_uj, active_uj, load_ns, load_ns, others_ns
            )
        )
        self._last = reading
        self._last_process_ns = process_ns

    def settle(self, stretches: Sequence[Stretch]) -> list[Claim]:
        """Give each of ``stretches``, which the readings cover, its energy."""
        idle_uj = [0] * len(stretches)
        active_uj = [0] * len(stretches)
        longest_ns = [0] * len(stretches)
        unknown: set[int] = set()
        for window, within in self._spread(stretches):
            if window.still:
                unknown.update(i for i, _, _ in within)
            for i, _, time_ns in within:
                longest_ns[i] = max(longest_ns[i], window.length_ns)
                if window.owned:
                    idle = min(window.idle_left_uj, window.idle_uj * time_ns // (window.length_ns * self._executors))
                    window.idle_left_uj -= idle
                    idle_uj[i] += idle
            if window.active_left_uj:
                loads_ns = [cpu_ns if self.by_cpu_time else time_ns for _, cpu_ns, time_ns in within]
                for (i, _, _), active in zip(within, window.share_active(loads_ns), strict=True):
                    active_uj[i] += active
        qualities = self._qualities(stretches, longest_ns)
        for i in unknown:
            qualities[i] = Quality.UNAVAILABLE
        return list(map(Claim, idle_uj, active_uj, qualities))

    def _spread(self, stretches: Sequence[Stretch]) -> list[tuple[_Window, list[tuple[int, int, int]]]]:
        """The windows in which ``stretches`` lie, with the place of each, its CPU time in it and on an executor.

        A step is taken to burn as much at any time. Of several, nobody has kept which lay in which window: their CPU
        time goes where the processor's was spent.
        """
        started_ns = min(each.started_ns for each in stretches)
        windows = [window for window in self._windows if window.end_ns > started_ns]
        spread: list[tuple[_Window, list[tuple[int, int, int]]]] = [(window, []) for window in windows]
        for i, each in enumerate(stretches):
            overlaps_ns = [max(0, window.overlap_ns(each)) for window in windows]
            loads_ns, load_ns = overlaps_ns, each.ended_ns - each.started_ns
            if each.steps > 1:
                spent_ns = [
                    window.load_ns if overlap_ns else 0
                    for window, overlap_ns in zip(windows, overlaps_ns, strict=True)
                ]
                if any(spent_ns):
                    loads_ns, load_ns = spent_ns, sum(spent_ns)
            for (_, within), overlap_ns, part_ns in zip(spread, overlaps_ns, loads_ns, strict=True):
                if overlap_ns:
                    time_ns = each.time_ns * overlap_ns // (each.ended_ns - each.started_ns)
                    within.append((i, each.cpu_ns * part_ns // load_ns, time_ns))
        return spread

    def expire(self, before_ns: int) -> Iterator[tuple[Reason, int]]:
        """Forget the windows that ended before, and say what no step has taken from them."""
        while self._windows and self._windows[0].end_ns < before_ns:
            window = self._windows.popleft()
            yield Reason.IDLE if window.owned else Reason.OTHER_PROCESSES, window.idle_left_uj
            left_uj, load_ns = window.active_left_uj, window.load_left_ns
            if not load_ns:
                yield Reason.UNRESOLVED, left_uj
                continue
            others_uj = left_uj * min(window.others_ns, load_ns) // load_ns
            yield Reason.OTHER_PROCESSES, others_uj
            yield Reason.OVERHEAD, left_uj - others_uj

    def _qualities(self, stretches: Sequence[Stretch], windows_ns: Sequence[int]) -> list[Quality]:
        """A step is measured where it fills a window at least; the energy of a shorter one is inferred."""
        if self.quality is not Quality.MEASURED:
            return [self.quality] * len(stretches)
        return [
            Quality.MEASURED if each.steps == 1 and each.ended_ns - each.started_ns >= window_ns else self.inferred
            for each, window_ns in zip(stretches, windows_ns, strict=True)
        ]
