"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon.

Steps of one model in one phase are charged together, as one stretch: each request pays by its load, which is its share
of each of those steps times what that took of the processor (of a GPU, its duration). One of which readings tell what
it took, as they are closer together, or that was running when the last stretches were settled, is charged alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from energy.attribution import share_loads, split
from energy.balances import Balances, Charged, Costs, Numbers, Rows
from energy.settlement import Channel, Claim, Stretch
from energy.types import BESIDE, NOTHING_BESIDE, Beside, Ended, Phase, Quality, Step

Rates = tuple[float, float]
"""Active and allocated energy per nanosecond of load, on all metered devices together, in microjoules."""
_RANK = {quality: rank for rank, quality in enumerate(Quality)}

End = tuple[Ended, int, Beside]
"""Of a request: when it was over, by the monotonic clock, and what it took beside the executors. Plain, as there is
one for every request."""
Shared = tuple[Rows, Numbers]
"""Who shares something, each once and in order, by row in the balances, and what falls to each of the load in
nanoseconds."""
_NOBODY: Shared = np.zeros(0, np.intp), np.zeros(0, np.int64)


@dataclass(slots=True, eq=False)
class Place:
    """Where steps run."""

    device: str
    """A step's, of several that are the same to a meter."""
    own: str
    """The metered device."""
    channels: tuple[Channel, ...]
    """The metered devices that a step burns energy on; none where its own has no meter."""
    is_executor: bool
    inferred: Quality
    """Of what is expected there."""
    rates: Rates | None = None
    """As settled last."""


@dataclass(slots=True, eq=False)
class Noted(Stretch):
    """Steps on the books that are charged as one: what is left is to learn their energy."""

    place: Place
    model: str
    phase: Phase | None
    """None of a step without requests."""
    load_ns: int = 0
    unread: list[Step] = field(default_factory=list)
    """Those among the steps of which it is still to be seen what falls to each request."""
    pieces: list[Shared] = field(default_factory=list)
    """Of what ran beside the executors, likewise."""
    read: Shared = _NOBODY
    """What falls to each of all the others."""


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(self, channels: Iterable[Channel]) -> None:
        self.balances = Balances()
        self.waiting: list[Noted] = []
        """What waits for a reading."""
        self._channels = {channel.device: channel for channel in channels}
        self._places: dict[str, Place] = {}
        """By device of a step."""
        self._together: dict[tuple[Place, str, Phase | None], Noted] = {}
        """Of what waits, where further steps go."""
        self._settled_ns = self._read_ns()
        self.window_ns = 0
        """What began since then and took less than that may go there."""
        self._settled_uj: dict[str, Numbers] = {}
        """What settled requests had been charged, by task: sums of their rows."""

    def note(self, steps: Iterable[Step]) -> None:
        """Put steps on the books; where their device has no meter, the bills of their requests are unknown."""
        alike: defaultdict[tuple[str, str, Phase | None], list[Step]] = defaultdict(list)
        for step in steps:
            alike[step.device, step.model, None if step.work is None else step.work.phase].append(step)
        for (device, model, phase), some in alike.items():
            place = self._places.get(device) or self._find_place(device)
            if not place.channels:
                self._lose(self.balances.open(_names(some)))
                continue
            together: list[Step] = []
            alone: list[list[Step]] = []
            for step in some:
                if self._is_short(step.started_ns, step.ended_ns):
                    together.append(step)
                else:
                    alone.append([step])
            for own in filter(None, (together, *alone)):
                started_ns, ended_ns = [step.started_ns for step in own], [step.ended_ns for step in own]
                noted = self._noted(place, model, phase, min(started_ns), max(ended_ns), own is together)
                noted.steps += len(own)
                noted.load_ns += sum([step.load_ns for step in own])
                noted.cpu_ns += sum([step.cpu_ns for step in own])
                if place.is_executor:
                    noted.time_ns += sum(ended_ns) - sum(started_ns)
                if phase is not None:
                    noted.unread += own

    def note_beside(self, ends: Sequence[End]) -> None:
        """Put CPU time that requests took beside the executors on the books, as if it had been spent in the end."""
        some = [end for end in ends if end[2] is not NOTHING_BESIDE]
        if not some:
            return
        requests, ends_ns, besides = zip(*some, strict=True)
        rows, over_ns = self.balances.open([request[0] for request in requests]), np.array(ends_ns)
        place = self._places.get(BESIDE) or self._find_place(BESIDE)
        if not place.channels:
            self._lose(rows)
            return
        models, which = [request[2] for request in requests], list(map(id, besides))
        of_model = {model: np.array([each == model for each in models]) for model in dict.fromkeys(models)}
        shared, is_new = dict(zip(which, besides, strict=True)), over_ns > self._settled_ns
        for phase in dict.fromkeys(chain.from_iterable([beside.by_phase for beside in shared.values()])):
            by_beside = {key: beside.by_phase.get(phase, 0) for key, beside in shared.items()}
            cpu_ns = np.array(list(map(by_beside.__getitem__, which)))
            for model, is_own in of_model.items():
                has = (cpu_ns > 0) & is_own
                # What ended before the last reading is charged apart, as steps are.
                for own in (has & is_new, has & ~is_new):
                    if own.any():
                        self._note_beside(place, model, phase, rows[own], cpu_ns[own], over_ns[own])

    def _note_beside(
        self, place: Place, model: str, phase: Phase, rows: Rows, cpu_ns: Numbers, over_ns: Numbers
    ) -> None:
        """So much CPU time of requests that were over then."""
        started_ns, ended_ns, sum_ns = int(over_ns.min()) - 1, int(over_ns.max()), int(cpu_ns.sum())
        noted = self._noted(place, model, phase, started_ns, ended_ns, self._is_short(started_ns, ended_ns))
        noted.steps += len(rows)
        noted.load_ns += sum_ns
        noted.cpu_ns += sum_ns
        noted.pieces.append((rows, cpu_ns))

    def part(self) -> None:
        """What is noted from now on is charged apart from what was noted before."""
        self._together.clear()

    def covered(self, horizon_ns: int) -> list[Noted]:
        """Take from what waits all that the readings cover; what ended before ``horizon_ns`` will never be, and its
        requests have no known bill."""
        self.part()
        self._settled_ns = self._read_ns()
        covered, waiting, lost = [], [], []
        for noted in self.waiting:
            if noted.ended_ns <= min([channel.read_ns for channel in noted.place.channels]):
                covered.append(noted)
            elif noted.ended_ns >= horizon_ns:
                waiting.append(noted)
            else:
                lost.append(noted)
        for rows, _ in self._shared(lost):
            self._lose(rows)
        self.waiting = waiting
        return covered

    def learn_rates(self, claims: Mapping[Noted, Sequence[Claim]]) -> dict[str, Rates]:
        """From now on expect what was settled last; returns that by the device of a step."""
        unknown, sums = set(), {noted.place: [0, 0, 0] for noted in claims}
        for noted, own in claims.items():
            total = sums[noted.place]
            total[0] += noted.load_ns
            for claim in own:
                total[1] += claim.idle_uj
                total[2] += claim.active_uj
                if claim.quality is Quality.UNAVAILABLE:
                    unknown.add(noted.place)
        for place, (load_ns, idle_uj, active_uj) in sums.items():
            if load_ns and place not in unknown:
                place.rates = active_uj / load_ns, (active_uj + idle_uj) / load_ns
        return {device: place.rates for device, place in self._places.items() if place.rates is not None}

    def are_waiting(self, names: Iterable[str]) -> list[bool]:
        """Which of these requests have a share of something that waits for a reading."""
        waiting = [rows for rows, _ in self._shared(self.waiting)]
        are: list[bool] = np.isin(self.balances.rows(names), np.concatenate([_NOBODY[0], *waiting])).tolist()
        return are

    def charge(self, claims: Mapping[Noted, Sequence[Claim]]) -> None:
        """Share what steps took among their requests; each has a claim on every channel of its place.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        due: list[tuple[int, Rows, Numbers, Charged]] = []
        known: defaultdict[Quality, list[Rows]] = defaultdict(list)
        for (noted, own), (rows, loads_ns) in zip(claims.items(), self._shared(list(claims)), strict=True):
            if noted.phase is None:
                continue
            # What costs nothing is known no better than what does.
            known[weakest(claim.quality for claim in own)].append(rows)
            for channel, claim in zip(noted.place.channels, own, strict=True):
                for energy_uj, is_active in ((claim.active_uj, True), (claim.idle_uj, False)):
                    if energy_uj:
                        charged = Charged(channel.device, noted.phase, noted.model, claim.quality, is_active)
                        due.append((energy_uj, rows, loads_ns, charged))
        for quality, their_rows in known.items():
            self.balances.know(np.concatenate(their_rows), quality)
        if due:
            energies_uj, whose, loads, what = zip(*due, strict=True)
            self.balances.charge(whose, what, split(energies_uj, loads))

    def occupy(self, covered: Iterable[Noted]) -> None:
        """Share the time on executors that steps took."""
        some = [noted for noted in covered if noted.phase is not None]
        if some:
            whose, loads = zip(*self._shared(some), strict=True)
            self.balances.occupy(whose, split([noted.time_ns for noted in some], loads))

    def _shared(self, noted: Sequence[Noted]) -> list[Shared]:
        """Who shares each of these."""
        new = [each for each in noted if each.unread or each.pieces]
        if new:
            self._read(new)
        return [each.read for each in noted]

    def _read(self, noted: Sequence[Noted]) -> None:
        """See what falls to each request."""
        steps = [step for each in noted for step in each.unread]
        rows, loads_ns = (self.balances.open(_names(steps)), share_loads(steps)) if steps else _NOBODY
        first = 0
        for each in noted:
            end = first + sum([len(step.work.request_ids) for step in each.unread if step.work is not None])
            pieces = [each.read, *each.pieces, (rows[first:end], loads_ns[first:end])]
            whose, what_ns = map(np.concatenate, zip(*pieces, strict=True))
            # Rows are small numbers, so nothing need be sorted.
            own = np.flatnonzero(np.bincount(whose))
            each.read = own, np.bincount(whose, what_ns)[own].astype(np.int64)
            each.pieces, each.unread, first = [], [], end

    def lose_all(self) -> None:
        """What waits will never have a reading."""
        for rows, _ in self._shared(self.waiting):
            self._lose(rows)
        self.waiting = []

    def expect_waiting(self, name: str) -> tuple[int, int, Quality]:
        """What a request will probably pay for what waits for a reading: active and allocated microjoules, and their
        quality, unavailable where there is nothing to judge by."""
        active_uj, allocated_uj, quality = 0.0, 0.0, Quality.MEASURED
        # Who is in a step that was not looked at yet has a row only then.
        shares = self._shared(self.waiting)
        row = self.balances.row(name)
        for each, (rows, loads_ns) in zip(self.waiting, shares, strict=True):
            number = rows.searchsorted(row)
            if number < len(rows) and rows[number] == row:
                if each.place.rates is None:
                    return 0, 0, Quality.UNAVAILABLE
                active, allocated = each.place.rates
                load_ns = int(loads_ns[number])
                active_uj += load_ns * active
                allocated_uj += load_ns * allocated
                quality = weaker(quality, each.place.inferred)
        return round(active_uj), round(allocated_uj), quality

    def settle(self, ended: Sequence[Ended]) -> Iterator[tuple[Rows, Costs]]:
        """These requests, some at least, are no longer open, and what they were charged counts for their tasks. Tells
        that of those that are alike together, with their numbers among ``ended``."""
        ids, tasks, models, statuses, _, _, _, _, keys = zip(*ended, strict=True)
        numbers = self.balances.take(ids)
        alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, labels in enumerate(zip(tasks, models, statuses, keys, strict=True)):
            alike[labels].append(number)
        for (task, *_), some in alike.items():
            own, among = numbers[some], np.array(some)
            sums_uj, before_uj = own.sum(0), self._settled_uj.get(task)
            if before_uj is not None:
                # Since then there may be more columns.
                sums_uj[: len(before_uj)] += before_uj
            self._settled_uj[task] = sums_uj
            for costs in self.balances.costs(own):
                yield among[costs.numbers], costs

    def attributed(self) -> Counter[tuple[str, str, str, Phase, Quality]]:
        """What settled requests were charged, by device, model, task, phase and quality."""
        total: Counter[tuple[str, str, str, Phase, Quality]] = Counter()
        for task, sums_uj in self._settled_uj.items():
            for (device, phase, model, quality, _), energy_uj in self.balances.by_charged(sums_uj):
                # Nearly everything is for other tasks.
                if energy_uj:
                    total[device, model, task, phase, quality] += energy_uj
        return total

    def open_uj(self) -> Counter[str]:
        """What has been charged and is not settled, by device."""
        total: Counter[str] = Counter()
        for charged, energy_uj in self.balances.sums():
            total[charged.device] += energy_uj
        return total

    def _find_place(self, device: str) -> Place:
        own, is_executor = device if device.startswith("gpu:") else "cpu", device != BESIDE
        for place in self._places.values():
            if (place.own, place.is_executor) == (own, is_executor):
                self._places[device] = place
                return place
        burnt = [channel for name, channel in self._channels.items() if name in (own, "cpu", "dram")]
        channels = tuple(burnt) if own in self._channels else ()
        place = Place(device, own, channels, is_executor, weakest(channel.inferred for channel in channels))
        self._places[device] = place
        return place

    def _is_short(self, started_ns: int, ended_ns: int) -> bool:
        """Whether readings do not tell what this took."""
        return started_ns > self._settled_ns and ended_ns - started_ns < self.window_ns

    def _noted(
        self, place: Place, model: str, phase: Phase | None, started_ns: int, ended_ns: int, is_short: bool
    ) -> Noted:
        """What a phase in this time is charged with; whoever calls adds what it took."""
        key = place, model, phase
        noted = self._together.get(key) if is_short else None
        if noted is None:
            noted = Noted(started_ns, ended_ns, 0, 0, 0, place, model, phase)
            self.waiting.append(noted)
            if is_short:
                self._together[key] = noted
        noted.started_ns, noted.ended_ns = min(started_ns, noted.started_ns), max(ended_ns, noted.ended_ns)
        return noted

    def _read_ns(self) -> int:
        """The latest reading."""
        return max((channel.read_ns for channel in self._channels.values()), default=0)

    def _lose(self, rows: Rows) -> None:
        """Some energy of these requests will never be known."""
        self.balances.know(rows, Quality.UNAVAILABLE)


def _names(steps: Iterable[Step]) -> Iterator[str]:
    """The requests of steps, as often as they are in any."""
    return chain.from_iterable([step.work.request_ids for step in steps if step.work is not None])


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)


def weaker(one: Quality, other: Quality) -> Quality:
    """The weaker of two."""
    return one if one is other or _RANK[one] > _RANK[other] else other
