"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon.

Short steps of one model in one phase are charged together, as one stretch: each request pays by its load, which is its
share of each of those steps times what that took of the processor (of a GPU, its duration). A step as long as the time
between two readings, or that was running when the last stretches were settled, is charged alone.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat
from operator import add
from typing import Any, NamedTuple, TypeVar

from energy.attribution import charge, split
from energy.settlement import BESIDE, Channel, Claim, Stretch
from energy.types import Part, Parts, Phase, Places, Quality, RequestRecord, Step, Work

T = TypeVar("T")
Rates = tuple[float, float]
"""Active and allocated energy per nanosecond of load, on all metered devices together, in microjoules."""
_RANK = {quality: rank for rank, quality in enumerate(Quality)}


class Charged(NamedTuple):
    """What a charge is for."""

    device: str
    phase: Phase
    model: str
    quality: Quality


Row = tuple[int, ...]
"""What a request has been charged on a sheet, in microjoules: active energy of all devices together, and then what is
allocated for each of ``charged``."""


@dataclass(slots=True, eq=False)
class Sheet:
    """All charges for one model in one phase. There are few of them, so that most is done for all requests at once."""

    charged: tuple[Charged, ...]
    """One for each device that energy was burnt on."""
    quality: Quality
    """Of all devices together."""
    rows: dict[str, Row] = field(default_factory=dict)
    """By request, as long as it is not settled."""


End = tuple[RequestRecord, int, Mapping[Phase, int]]
"""Of a request: when it was over, by the monotonic clock, and CPU time that it took beside the executors, by phase, of
which no step was recorded. Plain, as ``Cost`` is: of each there is one for every request."""

Cost = tuple[Iterable[Part], int, int, float, Quality | None]
"""One request's: parts, their sum, the active energy among that (in microjoules), the time of the whole machine (in
nanoseconds; an executor is a part of it), and a quality, None as long as nothing has been charged."""
NOTHING: Cost = ((), 0, 0, 0.0, None)


class _Form:
    """How rows of some sheets make a bill; the rows of each request stand side by side."""

    def __init__(self, sheets: Sequence[Sheet]) -> None:
        self.charged: list[Charged | None] = []
        """What each number of such rows is for; None is active energy."""
        for sheet in sheets:
            self.charged += [None, *sheet.charged]
        self._quality = weakest(sheet.quality for sheet in sheets)
        places = [charged and (charged.device, charged.phase) for charged in self.charged]
        self._all = Places(sorted(place for place in set(places) if place))
        self._active = [i for i, place in enumerate(places) if place is None]
        self._allocated = [[i for i, each in enumerate(places) if each == place] for place in self._all.all]
        self._some = {(True,) * len(self._all.all): self._all}
        """By which of them have energy."""

    def costs(self, columns: Sequence[Sequence[int]], machine_ns: Iterable[float]) -> Iterator[Cost]:
        """Of some requests, whose numbers stand in ``columns``."""
        active_uj = _added([columns[i] for i in self._active])
        parts_uj = list(zip(*[_added([columns[i] for i in each]) for each in self._allocated], strict=True))
        parts_uj = parts_uj or [()] * len(active_uj)
        parts, allocated_uj = map(self._parts, parts_uj), map(sum, parts_uj)
        return zip(parts, allocated_uj, active_uj, machine_ns, repeat(self._quality), strict=False)

    def _parts(self, row_uj: Row) -> Parts:
        """What is nothing is left out."""
        if 0 not in row_uj:
            return Parts(self._all, row_uj)
        has = tuple(map(bool, row_uj))
        if has not in self._some:
            self._some[has] = Places(compress(self._all.all, has))
        return Parts(self._some[has], tuple(filter(None, row_uj)))


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
        self._sheets: dict[tuple[tuple[Charged, ...], Quality], Sheet] = {}
        """By what they are for."""
        self._forms: dict[tuple[Sheet, ...], _Form] = {}
        self._settled_uj: dict[tuple[str, _Form], list[int]] = {}
        """What settled requests had been, by task and form."""
        self._machine_ns: dict[str, float] = {}
        """By open request."""

    def note(self, step: Step, loads_ns: Sequence[int]) -> None:
        """Put a step on the books, with what falls to each entry of its work; where its device has no meter, the bills
        of its requests are unknown."""
        place = self._places.get(step.device) or self._find_place(step.device)
        if not place.channels:
            self._lose([item.request_id for item in step.work])
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
        # What ended before the last reading is charged apart, as steps are.
        alike: defaultdict[tuple[str, bool], list[End]] = defaultdict(list)
        for record, at_ns, beside_ns in ends:
            if beside_ns:
                alike[record.model, at_ns > self._settled_ns].append((record, at_ns, beside_ns))
        for (model, _), some in alike.items():
            for phase in sorted(set().union(*[beside_ns for _, _, beside_ns in some])):
                loads = {record.request_id: beside_ns[phase] for record, _, beside_ns in some if phase in beside_ns}
                self._note_beside(model, phase, loads, [at_ns for _, at_ns, _ in some])

    def _note_beside(self, model: str, phase: Phase, loads: Mapping[str, int], ends_ns: Sequence[int]) -> None:
        place = self._places.get(BESIDE) or self._find_place(BESIDE)
        if not place.channels:
            self._lose(loads)
            return
        noted = self._noted(place, model, phase, min(ends_ns) - 1, max(ends_ns), len(loads))
        cpu_ns = sum(loads.values())
        noted.load_ns += cpu_ns
        noted.cpu_ns += cpu_ns
        _merge(noted.loads, loads, add)

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
                self._lose(noted.loads)
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

    def waiting_names(self) -> set[str]:
        """The requests that have a share of something that waits for a reading."""
        return set().union(*[noted.loads for noted in self.waiting])

    def charge(self, claims: Mapping[Noted, Sequence[Claim]]) -> None:
        """Share what steps took among their requests; each has a claim on every channel of its place.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        for noted, own in claims.items():
            if noted.phase is None:
                continue
            names, loads_ns = list(noted.loads), list(noted.loads.values())
            charged, columns, actives_uj = [], [], []
            for channel, claim in zip(noted.place.channels, own, strict=True):
                shares_uj = [split(uj, loads_ns, names) for uj in (claim.active_uj, claim.idle_uj) if uj]
                if shares_uj:
                    charged.append(Charged(channel.device, noted.phase, noted.model, claim.quality))
                    columns.append(_added(shares_uj))
                if claim.active_uj:
                    actives_uj.append(shares_uj[0])
            active_uj = _added(actives_uj) if actives_uj else [0] * len(names)
            # What costs nothing is known no better than what does.
            quality = weakest(claim.quality for claim in own)
            self._enter(charged, quality, names, zip(active_uj, *columns, strict=True))

    def occupy(self, covered: Sequence[Noted]) -> None:
        """Share the machine's time that steps took."""
        for noted in covered:
            shares_ns = charge(noted.time_ns, noted.loads) if noted.loads else {}
            own_ns = {name: time_ns / self._executors for name, time_ns in shares_ns.items()}
            _merge(self._machine_ns, own_ns, add)

    def lose_all(self) -> None:
        """What waits will never have a reading."""
        for noted in self.waiting:
            self._lose(noted.loads)
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
        rows = {sheet: sheet.rows[name] for sheet in self._sheets.values() if name in sheet.rows}
        if not rows:
            return NOTHING
        columns = [(number,) for row in rows.values() for number in row]
        return next(self._form(tuple(rows)).costs(columns, [self._machine_ns.get(name, 0.0)]))

    def settle(self, records: Sequence[RequestRecord]) -> dict[str, Cost]:
        """What these requests have been charged, by name; they are no longer open, and that counts for their tasks."""
        names, tasks = [record.request_id for record in records], [record.task for record in records]
        every_row = {
            sheet: list(map(sheet.rows.pop, names, repeat(None))) for sheet in self._sheets.values() if sheet.rows
        }
        costs = dict.fromkeys(names, NOTHING)
        for places in _alike(tasks, every_row.values()):
            own = [names[place] for place in places]
            columns: list[Sequence[int]] = []
            sheets = []
            for sheet, rows in every_row.items():
                if rows[places[0]] is not None:
                    sheets.append(sheet)
                    columns += zip(*[rows[place] for place in places], strict=True)
            if sheets:
                form = self._form(tuple(sheets))
                key = tasks[places[0]], form
                before_uj = self._settled_uj.get(key, [0] * len(columns))
                self._settled_uj[key] = list(map(add, before_uj, map(sum, columns)))
                machine_ns = map(self._machine_ns.pop, own, repeat(0.0))
                costs.update(zip(own, form.costs(columns, machine_ns), strict=True))
        return costs

    def attributed(self) -> Counter[tuple[Charged, str]]:
        """What settled requests were charged for what, by task."""
        total: Counter[tuple[Charged, str]] = Counter()
        for (task, form), sums_uj in self._settled_uj.items():
            for charged, energy_uj in zip(form.charged, sums_uj, strict=True):
                if charged is not None:
                    total[charged, task] += energy_uj
        return total

    def open_uj(self) -> Counter[str]:
        """What has been charged and is not settled, by device."""
        total: Counter[str] = Counter()
        for sheet in self._sheets.values():
            columns = list(zip(*sheet.rows.values(), strict=True))
            for charged, energies_uj in zip(sheet.charged, columns[1:], strict=False):
                total[charged.device] += sum(energies_uj)
        return total

    def _form(self, sheets: tuple[Sheet, ...]) -> _Form:
        if sheets not in self._forms:
            self._forms[sheets] = _Form(sheets)
        return self._forms[sheets]

    def _enter(self, charged: Iterable[Charged], quality: Quality, names: Iterable[str], rows: Iterable[Row]) -> None:
        """Charge each of ``names`` a row."""
        key = tuple(charged), quality
        sheet = self._sheets.get(key) or self._sheets.setdefault(key, Sheet(*key))
        _merge(sheet.rows, dict(zip(names, rows, strict=True)), lambda one, other: tuple(map(add, one, other)))

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

    def _lose(self, names: Collection[str]) -> None:
        """Some energy of these requests will never be known."""
        self._enter((), Quality.UNAVAILABLE, names, repeat((0,), len(names)))


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


def _alike(tasks: Sequence[str], every_row: Collection[Sequence[Row | None]]) -> Iterable[Sequence[int]]:
    """Places with the same task, and with a row in the same lists."""
    if len(set(tasks)) == 1 and not any([None in rows for rows in every_row]):
        # Nearly always.
        return [range(len(tasks))]
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, kind in enumerate(zip(tasks, *[[row is None for row in rows] for rows in every_row], strict=True)):
        alike[kind].append(place)
    return alike.values()


def _added(columns: Sequence[Sequence[int]]) -> Sequence[int]:
    """The sums of numbers side by side."""
    return columns[0] if len(columns) == 1 else list(map(sum, zip(*columns, strict=True)))


def _merge(totals: dict[str, T], amounts: Mapping[str, T], plus: Callable[[T, T], T]) -> None:
    # Nearly all names are new: without a look-up for each in Python, this takes a third of the time.
    known = {name: plus(totals[name], amounts[name]) for name in totals.keys() & amounts.keys()}
    totals.update(amounts)
    totals.update(known)


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)


def weaker(one: Quality, other: Quality) -> Quality:
    """The weaker of two."""
    return one if one is other or _RANK[one] > _RANK[other] else other
