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
        self.rates: Mapping[str, Rates] = {}
        """The same of those of which some is known. Replaced and never changed: reading it takes no lock."""
        self._together: dict[tuple[Place, str, Phase | None], Noted] = {}
        """Of what waits, where further steps go."""
        self._settled_ns = self._read_ns()
        self.window_ns = 0
        """What began since then and took less than that may go there."""
        self._settled_uj: dict[str, Numbers] = {}
        """What settled requests had been charged, by task: sums of their rows."""

    def note(self, step: Step) -> None:
        """Put a step on the books; where its device has no meter, the bills of its requests are unknown."""
        place = self._places.get(step.device) or self._find_place(step.device)
        if not place.channels:
            self._lose(self.balances.open(step.work.request_ids if step.work else ()))
            return
        phase = None if step.work is None else step.work.phase
        noted = self._noted(place, step.model, phase, step.started_ns, step.ended_ns)
        noted.load_ns += step.load_ns
        noted.cpu_ns += step.cpu_ns
        if place.is_executor:
            noted.time_ns += step.ended_ns - step.started_ns
        if step.work is not None:
            noted.unread.append(step)

    def note_beside(self, ends: Sequence[End]) -> None:
        """Put CPU time that requests took beside the executors on the books, as if it had been spent in the end."""
        some = [end for end in ends if end[2] is not NOTHING_BESIDE]
        if not some:
            return
        requests, ends_ns, besides = zip(*some, strict=True)
        rows, ended_ns = self.balances.open([request[0] for request in requests]), np.array(ends_ns)
        place = self._places.get(BESIDE) or self._find_place(BESIDE)
        if not place.channels:
            self._lose(rows)
            return
        # What ended before the last reading is charged apart, as steps are.
        alike: defaultdict[tuple[str, bool], list[int]] = defaultdict(list)
        for number, (request, is_new) in enumerate(zip(requests, (ended_ns > self._settled_ns).tolist(), strict=True)):
            alike[request[2], is_new].append(number)
        for (model, _), numbers in alike.items():
            own, own_ns, their = rows[numbers], ended_ns[numbers], [id(besides[number]) for number in numbers]
            shared = {id(beside): beside for beside in besides}
            for phase in dict.fromkeys(chain.from_iterable(beside.by_phase for beside in shared.values())):
                by_beside = {which: beside.by_phase.get(phase, 0) for which, beside in shared.items()}
                cpu_ns = np.array(list(map(by_beside.__getitem__, their)))
                has = cpu_ns > 0
                if not has.any():
                    continue
                noted = self._noted(
                    place, model, phase, int(own_ns[has].min()) - 1, int(own_ns[has].max()), int(has.sum())
                )
                noted.load_ns += int(cpu_ns.sum())
                noted.cpu_ns += int(cpu_ns.sum())
                noted.pieces.append((own[has], cpu_ns[has]))

    def part(self) -> None:
        """What is noted from now on is charged apart from what was noted before."""
        self._together.clear()

    def covered(self, horizon_ns: int) -> list[Noted]:
        """Take from what waits all that the readings cover; what ended before ``horizon_ns`` will never be, and its
        requests have no known bill."""
        self.part()
        self._settled_ns = self._read_ns()
        covered, waiting = [], []
        for noted in self.waiting:
            if noted.ended_ns <= min([channel.read_ns for channel in noted.place.channels]):
                covered.append(noted)
            elif noted.ended_ns >= horizon_ns:
                waiting.append(noted)
            else:
                self._lose(self._shared(noted)[0])
        self.waiting = waiting
        return covered

    def learn_rates(self, claims: Mapping[Noted, Sequence[Claim]]) -> None:
        """From now on expect what was settled last."""
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
        self.rates = {device: place.rates for device, place in self._places.items() if place.rates is not None}

    def are_waiting(self, names: Iterable[str]) -> list[bool]:
        """Which of these requests have a share of something that waits for a reading."""
        waiting = [self._shared(noted)[0] for noted in self.waiting]
        are: list[bool] = np.isin(self.balances.rows(names), np.concatenate([_NOBODY[0], *waiting])).tolist()
        return are

    def charge(self, claims: Mapping[Noted, Sequence[Claim]]) -> None:
        """Share what steps took among their requests; each has a claim on every channel of its place.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        due = []
        for noted, own in claims.items():
            if noted.phase is None:
                continue
            shared = self._shared(noted)
            # What costs nothing is known no better than what does.
            self.balances.know(shared[0], weakest(claim.quality for claim in own))
            for channel, claim in zip(noted.place.channels, own, strict=True):
                for energy_uj, is_active in ((claim.active_uj, True), (claim.idle_uj, False)):
                    if energy_uj:
                        charged = Charged(channel.device, noted.phase, noted.model, claim.quality, is_active)
                        due.append((energy_uj, *shared, charged))
        if due:
            energies_uj, rows, loads_ns, what = zip(*due, strict=True)
            self.balances.charge(rows, what, split(energies_uj, loads_ns))

    def occupy(self, covered: Iterable[Noted]) -> None:
        """Share the time on executors that steps took."""
        due = [(noted.time_ns, *self._shared(noted)) for noted in covered if noted.phase is not None]
        if due:
            times_ns, rows, loads_ns = zip(*due, strict=True)
            self.balances.occupy(rows, split(times_ns, loads_ns))

    def _shared(self, noted: Noted) -> Shared:
        """Who shares what was noted."""
        pieces, steps = noted.pieces, noted.unread
        if steps:
            names = chain.from_iterable([step.work.request_ids for step in steps if step.work is not None])
            pieces = [*pieces, (self.balances.open(names), share_loads(steps))]
        if pieces:
            every, loads_ns = map(np.concatenate, zip(noted.read, *pieces, strict=True))
            # Without sorting: rows are small numbers.
            rows = np.flatnonzero(np.bincount(every))
            noted.read = rows, np.bincount(every, loads_ns)[rows].astype(np.int64)
            noted.pieces, noted.unread = [], []
        return noted.read

    def lose_all(self) -> None:
        """What waits will never have a reading."""
        for noted in self.waiting:
            self._lose(self._shared(noted)[0])
        self.waiting = []

    def expect_waiting(self, name: str) -> tuple[int, int, Quality]:
        """What a request will probably pay for what waits for a reading: active and allocated microjoules, and their
        quality, unavailable where there is nothing to judge by."""
        active_uj, allocated_uj, quality = 0.0, 0.0, Quality.MEASURED
        # Who is in a step that was not looked at yet has a row only then.
        shares = [self._shared(each) for each in self.waiting]
        (row,) = self.balances.rows([name])
        for each, (rows, loads_ns) in zip(self.waiting, shares, strict=True):
            own_ns = loads_ns[rows == row]
            if len(own_ns):
                if each.place.rates is None:
                    return 0, 0, Quality.UNAVAILABLE
                active, allocated = each.place.rates
                active_uj += float(own_ns[0]) * active
                allocated_uj += float(own_ns[0]) * allocated
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

    def _noted(
        self, place: Place, model: str, phase: Phase | None, started_ns: int, ended_ns: int, steps: int = 1
    ) -> Noted:
        """What a phase of ``steps`` is charged with; whoever calls adds what they took."""
        key = place, model, phase
        is_short = started_ns > self._settled_ns and ended_ns - started_ns < self.window_ns
        noted = self._together.get(key) if is_short else None
        if noted is None:
            noted = Noted(started_ns, ended_ns, 0, 0, 0, place, model, phase)
            self.waiting.append(noted)
            if is_short:
                self._together[key] = noted
        elif started_ns < noted.started_ns:
            noted.started_ns = started_ns
        if ended_ns > noted.ended_ns:
            noted.ended_ns = ended_ns
        noted.steps += steps
        return noted

    def _read_ns(self) -> int:
        """The latest reading."""
        return max((channel.read_ns for channel in self._channels.values()), default=0)

    def _lose(self, rows: Rows) -> None:
        """Some energy of these requests will never be known."""
        self.balances.know(rows, Quality.UNAVAILABLE)


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)


def weaker(one: Quality, other: Quality) -> Quality:
    """The weaker of two."""
    return one if one is other or _RANK[one] > _RANK[other] else other
