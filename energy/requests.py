"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon.

Short steps of one model in one phase are charged together, as one stretch: each request pays by its load, which is its
share of each of those steps times what that took of the processor (of a GPU, its duration). A step as long as the time
between two readings, or that was running when the last stretches were settled, is charged alone.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from energy.attribution import DEFAULTS, Coefficients, charge, split, weigh
from energy.settlement import BESIDE, Channel, Claim, Stretch
from energy.types import Part, Phase, Quality, Step, Work

_RANK = {quality: rank for rank, quality in enumerate(Quality)}


class Charged(NamedTuple):
    """What a charge is for."""

    device: str
    model: str
    phase: Phase
    quality: Quality


@dataclass(slots=True, eq=False)
class Place:
    """Where steps run."""

    own: str
    """The metered device."""
    channels: tuple[Channel, ...]
    """The metered devices that a step burns energy on; none where its own has no meter."""
    is_executor: bool
    inferred: Quality
    """Of what is expected there."""
    rates: tuple[float, ...] | None = None
    """What is expected: of all channels together, see ``Channel.rates``."""

    def learn_rates(self) -> None:
        """Expect what was settled last."""
        rates = [channel.rates() for channel in self.channels]
        if None not in rates:
            self.rates = tuple(map(sum, zip(*rates, strict=True)))


@dataclass(slots=True, eq=False)
class Noted(Stretch):
    """Steps on the books that are charged as one: what is left is to learn their energy."""

    place: Place
    model: str
    phase: Phase | None
    """None of a step without requests."""
    load_ns: int
    loads: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By request, what is its part of that."""


@dataclass(slots=True)
class Cost:
    """One request's."""

    charges: dict[int, int] = field(default_factory=dict)
    """Allocated energy by the number of a ``Charged``."""
    active_uj: int = 0
    machine_ns: float = 0.0
    """Time of the whole machine, of which an executor is a part."""
    quality: Quality | None = None
    """None as long as nothing has been charged."""

    @property
    def allocated_uj(self) -> int:
        """All that has been charged."""
        return sum(self.charges.values())

    def weaken(self, quality: Quality) -> None:
        """Lower the quality to ``quality`` where that is worse."""
        self.quality = weaker(self.quality or quality, quality)


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(self, channels: Iterable[Channel], executors: int, coefficients: Mapping[str, Coefficients]) -> None:
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.waiting: list[Noted] = []
        """What waits for a reading."""
        self._executors = executors
        self._coefficients = coefficients
        self._channels = {channel.device: channel for channel in channels}
        self._places: dict[str, Place] = {}
        """By device of a step."""
        self._together: dict[tuple[Place, str, Phase | None], Noted] = {}
        """Of what waits, where further steps go."""
        self._settled_ns = self._read_ns()
        self.window_ns = 0
        """What began since then and took less than that may go there."""
        self._numbers: dict[Charged, int] = {}
        self._charged: list[Charged] = []
        """What each number is for: as a key, a number costs a tenth of what it stands for."""
        self._kinds: list[tuple[str, Phase]] = []
        """The device and the phase of each."""

    def note(self, step: Step) -> None:
        """Put a step on the books; where its device has no meter, the bills of its requests are unknown."""
        place = self._places.get(step.device) or self._find_place(step.device)
        if not place.channels:
            for item in step.work:
                self.costs[item.request_id].weaken(Quality.UNAVAILABLE)
            return
        work, duration_ns = step.work, step.ended_ns - step.started_ns
        time_ns = duration_ns if place.is_executor else 0
        load_ns = step.cpu_ns if place.own == "cpu" and step.cpu_ns else duration_ns
        if len(work) <= 1:
            noted = self._noted(place, step, work[0].phase if work else None, load_ns, step.cpu_ns, time_ns)
            for item in work:
                noted.loads[item.request_id] += load_ns
            return
        weights = weigh(work, self._coefficients.get(step.model, DEFAULTS))
        whole = sum(weights)
        if not whole:
            weights, whole = [1] * len(work), len(work)
        for phase, of_phase, phase_weights, parts in _by_phase(work, weights, (load_ns, step.cpu_ns, time_ns)):
            loads = self._noted(place, step, phase, *parts).loads
            for item, weight in zip(of_phase, phase_weights, strict=True):
                loads[item.request_id] += weight * load_ns // whole

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
                self._lose(noted)
        self.waiting = waiting
        return covered

    def learn_rates(self) -> None:
        """From now on, expect what was settled last."""
        for place in self._places.values():
            place.learn_rates()

    def waits(self, name: str) -> bool:
        """Whether a request has a share of something that waits for a reading."""
        return any(name in noted.loads for noted in self.waiting)

    def charge(self, device: str, claims: Iterable[tuple[Noted, Claim]]) -> None:
        """Share what steps took from one device among their requests.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        groups: dict[Charged, list[tuple[Claim, Mapping[str, int]]]] = {}
        for noted, claim in claims:
            if noted.phase is None:
                continue
            if claim.active_uj or claim.idle_uj:
                charged = Charged(device, noted.model, noted.phase, claim.quality)
                groups.setdefault(charged, []).append((claim, noted.loads))
            else:
                for name in noted.loads:
                    self.costs[name].weaken(claim.quality)
        for charged, shared in groups.items():
            number = self._number(charged)
            active_uj = charge([(claim.active_uj, loads) for claim, loads in shared])
            for name, energy_uj in active_uj.items():
                self.costs[name].active_uj += energy_uj
            for charges in (active_uj, charge([(claim.idle_uj, loads) for claim, loads in shared])):
                for name, energy_uj in charges.items():
                    cost = self.costs[name]
                    cost.charges[number] = cost.charges.get(number, 0) + energy_uj
                    if cost.quality is not charged.quality:
                        cost.weaken(charged.quality)

    def occupy(self, covered: Sequence[Noted]) -> None:
        """Share the machine's time that steps took."""
        for name, time_ns in charge([(noted.time_ns, noted.loads) for noted in covered if noted.loads]).items():
            self.costs[name].machine_ns += time_ns / self._executors

    def lose_all(self) -> None:
        """What waits will never have a reading."""
        for noted in self.waiting:
            self._lose(noted)
        self.waiting = []

    def expect(self, name: str) -> Claim | None:
        """What a request will probably pay for what waits for a reading; None where there is nothing to judge by."""
        idle_uj, active_uj, quality = 0.0, 0.0, Quality.MEASURED
        for noted in self.waiting:
            load_ns = noted.loads.get(name)
            if load_ns is not None:
                place = noted.place
                if place.rates is None:
                    return None
                idle, by_cpu_time, by_time = place.rates
                share = load_ns / (noted.load_ns or 1)
                idle_uj += share * noted.time_ns * idle
                active_uj += share * (noted.cpu_ns * by_cpu_time + noted.time_ns * by_time)
                quality = weaker(quality, place.inferred)
        return Claim(round(idle_uj), round(active_uj), quality)

    def charges(self, charges: Mapping[int, int]) -> list[tuple[Charged, int]]:
        """What has been charged for what."""
        return [(self._charged[number], energy_uj) for number, energy_uj in charges.items()]

    def parts(self, cost: Cost) -> tuple[Part, ...]:
        """What has been charged, by device and phase."""
        parts: list[Part] = []
        for device, phase, energy_uj in sorted([(*self._kinds[number], uj) for number, uj in cost.charges.items()]):
            if parts and parts[-1][:2] == (device, phase):
                energy_uj += parts.pop().energy_uj
            parts.append(Part(device, phase, energy_uj))
        return tuple(parts)

    def open_uj(self) -> Counter[str]:
        """What has been charged and is not settled, by device."""
        total: Counter[str] = Counter()
        for cost in self.costs.values():
            for charged, energy_uj in self.charges(cost.charges):
                total[charged.device] += energy_uj
        return total

    def _number(self, charged: Charged) -> int:
        number = self._numbers.get(charged)
        if number is None:
            number = self._numbers[charged] = len(self._charged)
            self._charged.append(charged)
            self._kinds.append((charged.device, charged.phase))
        return number

    def _find_place(self, device: str) -> Place:
        own, is_executor = device if device.startswith("gpu:") else "cpu", device != BESIDE
        for place in self._places.values():
            if (place.own, place.is_executor) == (own, is_executor):
                self._places[device] = place
                return place
        burnt = [channel for name, channel in self._channels.items() if name in (own, "cpu", "dram")]
        channels = tuple(burnt) if own in self._channels else ()
        place = Place(own, channels, is_executor, weakest(channel.inferred for channel in channels))
        place.learn_rates()
        self._places[device] = place
        return place

    def _noted(self, place: Place, step: Step, phase: Phase | None, load_ns: int, cpu_ns: int, time_ns: int) -> Noted:
        """What a phase of a step is charged with; the step took so much for it."""
        key = place, step.model, phase
        started_ns, ended_ns = step.started_ns, step.ended_ns
        is_short = started_ns > self._settled_ns and ended_ns - started_ns < self.window_ns
        noted = self._together.get(key) if is_short else None
        if noted is None:
            noted = Noted(started_ns, ended_ns, cpu_ns, time_ns, 1, place, step.model, phase, load_ns)
            self.waiting.append(noted)
            if is_short:
                self._together[key] = noted
            return noted
        if started_ns < noted.started_ns:
            noted.started_ns = started_ns
        if ended_ns > noted.ended_ns:
            noted.ended_ns = ended_ns
        noted.cpu_ns += cpu_ns
        noted.time_ns += time_ns
        noted.steps += 1
        noted.load_ns += load_ns
        return noted

    def _read_ns(self) -> int:
        """The latest reading."""
        return max((channel.read_ns for channel in self._channels.values()), default=0)

    def _lose(self, noted: Noted) -> None:
        for name in noted.loads:
            self.costs[name].weaken(Quality.UNAVAILABLE)


_Portion = tuple[Phase, Sequence[Work], Sequence[int], Sequence[int]]
"""A phase, the work in it, the weights of that, and what falls to it of some quantities of the step."""


def _by_phase(work: Sequence[Work], weights: Sequence[int], wholes: Sequence[int]) -> list[_Portion]:
    """What a step did in each phase; nearly always there is one."""
    phases = {item.phase for item in work}
    if len(phases) == 1:
        return [(work[0].phase, work, weights, wholes)]
    ordered = sorted(phases)
    portions = []
    for phase in ordered:
        pairs = [(item, weight) for item, weight in zip(work, weights, strict=True) if item.phase is phase]
        portions.append(([item for item, _ in pairs], [weight for _, weight in pairs]))
    sums = [sum(mine) for _, mine in portions]
    parts = zip(*[split(whole, sums, ordered) for whole in wholes], strict=True)
    return [(phase, *portion, part) for phase, portion, part in zip(ordered, portions, parts, strict=True)]


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)


def weaker(one: Quality, other: Quality) -> Quality:
    """The weaker of two."""
    return one if one is other or _RANK[one] > _RANK[other] else other
