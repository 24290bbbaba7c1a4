"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from energy.attribution import DEFAULTS, Coefficients, charge, fractions, split
from energy.settlement import BESIDE, Channel, Claim
from energy.types import Part, Phase, Quality, Step, Work

_RANK = {quality: rank for rank, quality in enumerate(Quality)}


class Charged(NamedTuple):
    """What a charge is for."""

    device: str
    model: str
    phase: Phase
    quality: Quality


class Portion(NamedTuple):
    """What a step did in one phase."""

    phase: Phase
    names: Sequence[str]
    """The requests in the step, each once."""
    parts: Sequence[int]
    """Their shares; see ``fractions``."""


class Noted(NamedTuple):
    """A step on the books: what is left is to learn its energy."""

    step: Step
    own: str
    """The metered device that it ran on."""
    channels: tuple[Channel, ...]
    """The metered devices that it burnt energy on."""
    portions: list[Portion]
    """By phase; nearly always one."""
    shares: Mapping[str, int]
    """Of its requests, over all portions."""
    whole: int
    """The sum of all shares."""
    time_ns: int
    """Time on an executor."""


@dataclass(slots=True)
class Cost:
    """One request's."""

    charges: dict[int, int] = field(default_factory=dict)
    """Allocated energy by the number of a ``Charged``."""
    active_uj: int = 0
    allocated_uj: int = 0
    machine_ns: float = 0.0
    """Time of the whole machine, of which an executor is a part."""
    quality: Quality | None = None
    """None as long as nothing has been charged."""

    def weaken(self, quality: Quality) -> None:
        """Lower the quality to ``quality`` where that is worse."""
        self.quality = quality if self.quality is None else weakest((self.quality, quality))


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(self, channels: Iterable[Channel], executors: int, coefficients: Mapping[str, Coefficients]) -> None:
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self._executors = executors
        self._coefficients = coefficients
        self._channels = {channel.device: channel for channel in channels}
        self._burnt: dict[str, tuple[Channel, ...]] = {}
        """By device of a step, those that it burns energy on."""
        self._waiting: list[Noted] = []
        """The steps that wait for a reading."""
        self._numbers: dict[Charged, int] = {}
        self._charged: list[Charged] = []
        """What each number is for: as a key, a number costs a tenth of what it stands for."""

    def note(self, step: Step) -> Noted | None:
        """The step with its requests' shares; None where its device has no meter, and their bills are unknown."""
        own = step.device if step.device.startswith("gpu:") else "cpu"
        channels = self._channels_of(own)
        if not channels:
            for item in step.work:
                self.costs[item.request_id].weaken(Quality.UNAVAILABLE)
            return None
        portions = _portions(step.work, fractions(step.work, self._coefficients.get(step.model, DEFAULTS)))
        shares = _over_all(portions)
        time_ns = 0 if step.device == BESIDE else step.ended_ns - step.started_ns
        noted = Noted(step, own, channels, portions, shares, sum(shares.values()), time_ns)
        self._waiting.append(noted)
        return noted

    def await_only(self, steps: Iterable[Noted]) -> None:
        """From now on, these are the steps that wait for a reading."""
        self._waiting = list(steps)

    def waits(self, name: str) -> bool:
        """Whether a request has a share of a step that waits for a reading."""
        return any(name in noted.shares for noted in self._waiting)

    def covered_ns(self, own: str) -> int:
        """Until when every meter has been read that counts what a device does; it has one."""
        return min(channel.read_ns for channel in self._channels_of(own))

    def charge(self, device: str, claims: Sequence[tuple[Noted, Claim]]) -> None:
        """Share what steps took from one device among their requests.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        groups: dict[Charged, tuple[list[_Share], list[_Share]]] = {}
        for noted, claim in claims:
            if not claim.active_uj and not claim.idle_uj:
                for name in noted.shares:
                    self.costs[name].weaken(claim.quality)
                continue
            for portion, part in _by_phase(noted, claim):
                charged = Charged(device, noted.step.model, portion.phase, part.quality)
                active, idle = groups.setdefault(charged, ([], []))
                active.append((part.active_uj, portion.names, portion.parts))
                idle.append((part.idle_uj, portion.names, portion.parts))
        for charged, (active, idle) in groups.items():
            number = self._number(charged)
            active_uj, idle_uj = charge(active), charge(idle)
            for name in active_uj | idle_uj:
                own_uj = active_uj.get(name, 0)
                both_uj = own_uj + idle_uj.get(name, 0)
                cost = self.costs[name]
                cost.active_uj += own_uj
                cost.allocated_uj += both_uj
                cost.charges[number] = cost.charges.get(number, 0) + both_uj
                if cost.quality is not charged.quality:
                    cost.weaken(charged.quality)

    def occupy(self, steps: Sequence[Noted]) -> None:
        """Share the machine's time that ``steps`` took."""
        portions = ((noted.time_ns, portion.names, portion.parts) for noted in steps for portion in noted.portions)
        for name, time_ns in charge(portions).items():
            self.costs[name].machine_ns += time_ns / self._executors

    def lose(self, steps: Sequence[Noted]) -> None:
        """These will never have a reading: their requests have no known bill."""
        for name in {name for noted in steps for portion in noted.portions for name in portion.names}:
            self.costs[name].weaken(Quality.UNAVAILABLE)

    def expect(self, name: str) -> list[Claim] | None:
        """What a request will probably pay for the steps that wait for a reading; None where there is nothing to
        judge by."""
        loads: dict[str, tuple[float, float]] = {}
        for noted in self._waiting:
            if name not in noted.shares:
                continue
            share = noted.shares[name] / noted.whole
            cpu_ns, time_ns = loads.get(noted.own, (0.0, 0.0))
            loads[noted.own] = cpu_ns + noted.step.cpu_ns * share, time_ns + noted.time_ns * share
        expected = []
        for own, (cpu_ns, time_ns) in loads.items():
            for channel in self._channels_of(own):
                claim = channel.expect(cpu_ns, time_ns)
                if claim is None:
                    return None
                expected.append(claim)
        return expected

    def charges(self, cost: Cost) -> list[tuple[Charged, int]]:
        """What has been charged for what."""
        return [(self._charged[number], energy_uj) for number, energy_uj in cost.charges.items()]

    def parts(self, cost: Cost) -> tuple[Part, ...]:
        """What has been charged, by device and phase."""
        parts: dict[tuple[str, Phase], int] = {}
        for (device, _, phase, _), energy_uj in self.charges(cost):
            parts[device, phase] = parts.get((device, phase), 0) + energy_uj
        return tuple(Part(device, phase, energy_uj) for (device, phase), energy_uj in sorted(parts.items()))

    def open_uj(self) -> Counter[str]:
        """What has been charged and is not settled, by device."""
        total: Counter[str] = Counter()
        for cost in self.costs.values():
            for charged, energy_uj in self.charges(cost):
                total[charged.device] += energy_uj
        return total

    def _number(self, charged: Charged) -> int:
        number = self._numbers.get(charged)
        if number is None:
            number = self._numbers[charged] = len(self._charged)
            self._charged.append(charged)
        return number

    def _channels_of(self, own: str) -> tuple[Channel, ...]:
        """The metered devices that a step on ``own`` burns energy on; none where that has no meter."""
        if own not in self._burnt:
            burnt = [channel for device, channel in self._channels.items() if device in (own, "cpu", "dram")]
            self._burnt[own] = tuple(burnt) if own in self._channels else ()
        return self._burnt[own]


_Share = tuple[int, Sequence[str], Sequence[int]]
"""Energy, and who shares it how; see ``charge``."""


def _portions(work: Sequence[Work], shares: Sequence[int]) -> list[Portion]:
    """What falls to each request, by phase."""
    if len(work) == 1:
        return [Portion(work[0].phase, (work[0].request_id,), shares)]
    names = [item.request_id for item in work]
    phases = {item.phase for item in work}
    if len(phases) == 1 and len(set(names)) == len(names):
        return [Portion(phases.pop(), names, shares)]
    by_phase: dict[Phase, dict[str, int]] = {}
    for item, share in zip(work, shares, strict=True):
        mine = by_phase.setdefault(item.phase, {})
        mine[item.request_id] = mine.get(item.request_id, 0) + share
    return [Portion(phase, tuple(mine), list(mine.values())) for phase, mine in by_phase.items()]


def _over_all(portions: Sequence[Portion]) -> dict[str, int]:
    """The share of each request in all ``portions`` of a step."""
    shares: dict[str, int] = {}
    for portion in portions:
        more = zip(portion.names, portion.parts, strict=True)
        shares |= more if not shares else [(name, shares.get(name, 0) + part) for name, part in more]
    return shares


def _by_phase(noted: Noted, claim: Claim) -> Iterable[tuple[Portion, Claim]]:
    """The portions of a step, with what falls to each of its claim."""
    if len(noted.portions) == 1:
        return [(noted.portions[0], claim)]
    weights = [sum(portion.parts) for portion in noted.portions]
    phases = [portion.phase for portion in noted.portions]
    active_uj, idle_uj = split(claim.active_uj, weights, phases), split(claim.idle_uj, weights, phases)
    return [
        (portion, Claim(idle, active, claim.quality))
        for portion, active, idle in zip(noted.portions, active_uj, idle_uj, strict=True)
    ]


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_RANK.__getitem__, default=Quality.UNAVAILABLE)
