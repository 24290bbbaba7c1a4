"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon.

Short steps of one model in one phase are charged together, as one stretch: each request pays by its load, which is its
share of each of those steps times what that took of the processor (of a GPU, its duration). A step as long as the time
between two readings, or that was running when the last stretches were settled, is charged alone.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from energy.attribution import charge, split
from energy.settlement import BESIDE, Channel, Claim, Stretch
from energy.types import Part, Parts, Phase, Places, Quality, RequestRecord, Step, Work

T = TypeVar("T", int, float)
Rates = tuple[float, float]
"""Active and allocated energy per nanosecond of load, on all metered devices together, in microjoules."""
_RANK = {quality: rank for rank, quality in enumerate(Quality)}


class Charged(NamedTuple):
    """What a charge is for."""

    device: str
    phase: Phase
    model: str
    quality: Quality


@dataclass(slots=True, eq=False)
class Column:
    """All charges for one thing, in microjoules: as many look-ups as requests, and no objects for each of them."""

    open_uj: dict[str, int] = field(default_factory=dict)
    """By request, as long as it is not settled."""
    settled_uj: Counter[str] = field(default_factory=Counter)
    """By task."""


class End(NamedTuple):
    """Of a request."""

    record: RequestRecord
    time_s: float
    """Since 1970."""
    at_ns: int
    """The same by the monotonic clock."""
    beside_ns: Mapping[Phase, int]
    """CPU time that it took beside the executors, by phase, and no step was recorded of."""


class Cost(NamedTuple):
    """One request's."""

    parts: Iterable[Part]
    allocated_uj: int
    """The sum of them."""
    active_uj: int
    machine_ns: float
    """Time of the whole machine, of which an executor is a part."""
    quality: Quality | None
    """None as long as nothing has been charged."""


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
    loads: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By request, what falls to it of that."""


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(self, channels: Iterable[Channel], executors: int) -> None:
        self.waiting: list[Noted] = []
        """What waits for a reading."""
        self._executors = executors
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
        self._columns: dict[Charged, Column] = {}
        """In the order of devices and phases."""
        self._active_uj: dict[str, int] = {}
        """By open request."""
        self._machine_ns: dict[str, float] = {}
        """Likewise."""

    def note(self, step: Step, loads_ns: Sequence[int]) -> None:
        """Put a step on the books, with what falls to each entry of its work; where its device has no meter, the bills
        of its requests are unknown."""
        place = self._places.get(step.device) or self._find_place(step.device)
        if not place.channels:
            for item in step.work:
                self._lose(place, step.model, item.phase, [item.request_id])
            return
        time_ns = step.ended_ns - step.started_ns if place.is_executor else 0
        for phase, work, work_loads_ns, (load_ns, cpu_ns, own_time_ns) in _by_phase(step, loads_ns, time_ns):
            noted = self._noted(place, step.model, phase, step.started_ns, step.ended_ns)
            noted.load_ns += load_ns
            noted.cpu_ns += cpu_ns
            noted.time_ns += own_time_ns
            loads = noted.loads
            for item, load_ns in zip(work, work_loads_ns, strict=True):
                loads[item.request_id] += load_ns

    def note_beside(self, ends: Sequence[End]) -> None:
        """Put CPU time that requests took beside the executors on the books, as if it had been spent in the end."""
        for is_new in (False, True):
            # What ended before the last reading is charged apart, as steps are.
            some = [end for end in ends if (end.at_ns > self._settled_ns) is is_new]
            spent: defaultdict[tuple[str, Phase], defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
            for record, _, _, beside_ns in some:
                for phase, cpu_ns in beside_ns.items():
                    spent[record.model, phase][record.request_id] += cpu_ns
            for (model, phase), loads in spent.items():
                self._note_beside(model, phase, loads, [end.at_ns for end in some])

    def _note_beside(self, model: str, phase: Phase, loads: Mapping[str, int], ends_ns: Sequence[int]) -> None:
        place = self._places.get(BESIDE) or self._find_place(BESIDE)
        if not place.channels:
            self._lose(place, model, phase, loads)
            return
        noted = self._noted(place, model, phase, min(ends_ns) - 1, max(ends_ns), len(loads))
        cpu_ns = sum(loads.values())
        noted.load_ns += cpu_ns
        noted.cpu_ns += cpu_ns
        _add(noted.loads, loads)

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
                self._lose(noted.place, noted.model, noted.phase, noted.loads)
        self.waiting = waiting
        return covered

    def learn_rates(self, covered: Sequence[Noted], claims: Sequence[tuple[Noted, Claim]]) -> None:
        """From now on expect what was settled last: what ``covered`` took from all devices."""
        unknown = {noted.place for noted, claim in claims if claim.quality is Quality.UNAVAILABLE}
        sums = {noted.place: [0, 0, 0] for noted in covered}
        for noted in covered:
            sums[noted.place][0] += noted.load_ns
        for noted, claim in claims:
            sums[noted.place][1] += claim.idle_uj
            sums[noted.place][2] += claim.active_uj
        for place, (load_ns, idle_uj, active_uj) in sums.items():
            if load_ns and place not in unknown:
                place.rates = active_uj / load_ns, (active_uj + idle_uj) / load_ns
        self.rates = {device: place.rates for device, place in self._places.items() if place.rates is not None}

    def waiting_names(self) -> set[str]:
        """The requests that have a share of something that waits for a reading."""
        return set().union(*[noted.loads for noted in self.waiting])

    def charge(self, device: str, claims: Iterable[tuple[Noted, Claim]]) -> None:
        """Share what steps took from one device among their requests.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        for noted, claim in claims:
            if noted.phase is None:
                continue
            charged = Charged(device, noted.phase, noted.model, claim.quality)
            active_uj = charge(claim.active_uj, noted.loads)
            idle_uj = charge(claim.idle_uj, noted.loads)
            _add(self._active_uj, active_uj)
            self._charge(charged, active_uj)
            self._charge(charged, idle_uj)
            if not (active_uj or idle_uj):
                # What costs nothing is known no better than what does.
                self._charge(charged, dict.fromkeys(noted.loads, 0))

    def occupy(self, covered: Sequence[Noted]) -> None:
        """Share the machine's time that steps took."""
        for noted in covered:
            shares_ns = charge(noted.time_ns, noted.loads) if noted.loads else {}
            _add(self._machine_ns, {name: time_ns / self._executors for name, time_ns in shares_ns.items()})

    def lose_all(self) -> None:
        """What waits will never have a reading."""
        for noted in self.waiting:
            self._lose(noted.place, noted.model, noted.phase, noted.loads)
        self.waiting = []

    def expect_waiting(self, name: str) -> tuple[int, int, Quality]:
        """What a request will probably pay for what waits for a reading: active and allocated microjoules, and their
        quality, unavailable where there is nothing to judge by."""
        active_uj, allocated_uj, quality = 0.0, 0.0, Quality.MEASURED
        for each in self.waiting:
            if name in each.loads:
                if each.place.rates is None:
                    return 0, 0, Quality.UNAVAILABLE
                active, allocated = each.place.rates
                active_uj += each.loads[name] * active
                allocated_uj += each.loads[name] * allocated
                quality = weaker(quality, each.place.inferred)
        return round(active_uj), round(allocated_uj), quality

    def cost(self, name: str) -> Cost:
        """What a request has been charged so far."""
        charged_uj = {charged: [column.open_uj.get(name)] for charged, column in self._columns.items()}
        (cost,) = self._costs([name], charged_uj, dict.get)
        return cost

    def settle(self, records: Sequence[RequestRecord]) -> list[Cost]:
        """What these requests have been charged; they are no longer open, and that counts for their tasks."""
        names, tasks = [record.request_id for record in records], [record.task for record in records]
        charged_uj = {}
        for charged, column in self._columns.items():
            if column.open_uj:
                charged_uj[charged] = amounts_uj = list(map(column.open_uj.pop, names, repeat(None)))
                for task, energy_uj in zip(tasks, amounts_uj, strict=True):
                    if energy_uj:
                        column.settled_uj[task] += energy_uj
        return self._costs(names, charged_uj, dict.pop)

    def _costs(
        self, names: Sequence[str], charged_uj: Mapping[Charged, Sequence[int | None]], take: Callable[..., Any]
    ) -> list[Cost]:
        """The costs of requests, from what each has been charged for what; None is not at all. ``take`` leaves what
        else is known of them on the books or not."""
        parts_uj: dict[tuple[str, Phase], Sequence[int | None]] = {}
        for (device, phase, _, _), amounts_uj in charged_uj.items():
            before_uj = parts_uj.get((device, phase))
            if before_uj is not None:
                amounts_uj = [(one or 0) + (other or 0) for one, other in zip(before_uj, amounts_uj, strict=True)]
            parts_uj[device, phase] = amounts_uj
        places: dict[tuple[bool, ...], Places] = {}
        """By which of these a request has."""
        qualities = [charged.quality for charged in charged_uj]
        worst = weakest(qualities) if qualities else None
        costs = []
        for name, amounts_uj, row_uj in zip(names, _rows(charged_uj, names), _rows(parts_uj, names), strict=True):
            # Nearly always all have been charged for the same.
            quality = worst if None not in amounts_uj else _weakest_known(qualities, amounts_uj)
            active_uj, machine_ns = take(self._active_uj, name, 0), take(self._machine_ns, name, 0.0)
            has = tuple(map(bool, row_uj))
            if has not in places:
                places[has] = Places(compress(parts_uj, has))
            energies_uj = tuple(filter(None, row_uj))
            costs.append(Cost(Parts(places[has], energies_uj), sum(energies_uj), active_uj, machine_ns, quality))
        return costs

    def attributed(self) -> Iterator[tuple[Charged, str, int]]:
        """What settled requests were charged for what, by task."""
        for charged, column in self._columns.items():
            for task, energy_uj in column.settled_uj.items():
                yield charged, task, energy_uj

    def open_uj(self) -> Counter[str]:
        """What has been charged and is not settled, by device."""
        total: Counter[str] = Counter()
        for charged, column in self._columns.items():
            total[charged.device] += sum(column.open_uj.values())
        return total

    def _charge(self, charged: Charged, amounts_uj: Mapping[str, int]) -> None:
        if charged not in self._columns:
            self._columns = dict(sorted([*self._columns.items(), (charged, Column())], key=itemgetter(0)))
        _add(self._columns[charged].open_uj, amounts_uj)

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

    def _lose(self, place: Place, model: str, phase: Phase | None, names: Iterable[str]) -> None:
        """Some energy of these requests will never be known."""
        if phase is not None:
            self._charge(Charged(place.own, phase, model, Quality.UNAVAILABLE), dict.fromkeys(names, 0))


_Portion = tuple[Phase | None, Sequence[Work], Sequence[int], Sequence[int]]
"""A phase, the work in it, the loads of that, and what falls to it of the step's load, CPU time and time."""


def _by_phase(step: Step, loads_ns: Sequence[int], time_ns: int) -> list[_Portion]:
    """What a step did in each phase; nearly always there is one."""
    work, wholes = step.work, (step.load_ns, step.cpu_ns, time_ns)
    phase = work[0].phase if work else None
    if all([item.phase is phase for item in work]):
        return [(phase, work, loads_ns, wholes)]
    portions = []
    for phase in sorted({item.phase for item in work}):
        pairs = [(item, load_ns) for item, load_ns in zip(work, loads_ns, strict=True) if item.phase is phase]
        portions.append((phase, [item for item, _ in pairs], [load_ns for _, load_ns in pairs]))
    phases, sums = [phase for phase, _, _ in portions], [sum(mine) for _, _, mine in portions]
    parts = zip(*[split(whole, sums, phases) for whole in wholes], strict=True)
    return [(*portion, part) for portion, part in zip(portions, parts, strict=True)]


def _rows(columns: Mapping[Any, Sequence[int | None]], names: Sequence[str]) -> Iterable[tuple[int | None, ...]]:
    """Of each of ``names`` what ``columns`` have, of which there may be none."""
    return zip(*columns.values(), strict=True) if columns else repeat((), len(names))


def _weakest_known(qualities: Sequence[Quality], amounts_uj: Sequence[int | None]) -> Quality | None:
    known = [quality for quality, amount_uj in zip(qualities, amounts_uj, strict=True) if amount_uj is not None]
    return weakest(known) if known else None


def _add(totals: dict[str, T], amounts: Mapping[str, T]) -> None:
    # Nearly all names are new: without a look-up for each in Python, this takes a third of the time.
    known = {name: totals[name] + amounts[name] for name in totals.keys() & amounts.keys()}
    totals.update(amounts)
    totals.update(known)


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)


def weaker(one: Quality, other: Quality) -> Quality:
    """The weaker of two."""
    return one if one is other or _RANK[one] > _RANK[other] else other
