"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from energy.attribution import DEFAULTS, Coefficients, charge, fractions, split
from energy.settlement import BESIDE, Channel, Claim
from energy.types import Part, Phase, Quality, Step

_BEST_FIRST = list(Quality)


class Charged(NamedTuple):
    """What a charge is for."""

    device: str
    model: str
    phase: Phase
    quality: Quality


@dataclass(slots=True)
class Noted:
    """A step on the books of its requests: what is left is to learn its energy."""

    step: Step
    own: str
    """The metered device that it ran on."""
    channels: tuple[Channel, ...]
    """The metered devices that it burnt energy on."""
    names: list[str]
    """The request of each entry of its work."""
    shares: list[int]
    """Of each entry; see ``fractions``."""
    cpu_ns: float
    """CPU time per unit of the shares."""
    time_ns: float
    """Time on an executor per unit of the shares."""
    waits: bool = True

    @property
    def covered(self) -> bool:
        """Whether every meter has been read since it ended."""
        return all(channel.read_ns >= self.step.ended_ns for channel in self.channels)


@dataclass(slots=True)
class Cost:
    """One request's."""

    charges: Counter[int] = field(default_factory=Counter)
    """Allocated energy by the number of a ``Charged``."""
    active_uj: int = 0
    allocated_uj: int = 0
    machine_ns: float = 0.0
    """Time of the whole machine, of which an executor is a part."""
    quality: Quality | None = None
    """None as long as nothing has been charged."""
    waiting: list[tuple[Noted, int]] = field(default_factory=list)
    """Steps that no reading covers yet, and its share of each."""

    def weaken(self, quality: Quality) -> None:
        """Lower the quality to ``quality`` where that is worse."""
        if quality is not self.quality:
            self.quality = quality if self.quality is None else weakest((self.quality, quality))


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(self, channels: Iterable[Channel], executors: int, coefficients: Mapping[str, Coefficients]) -> None:
        self.costs: dict[str, Cost] = {}
        self._executors = executors
        self._coefficients = coefficients
        self._channels = {channel.device: channel for channel in channels}
        self._numbers: dict[Charged, int] = {}
        self._charged: list[Charged] = []
        """What each number is for: as a key, a number costs a tenth of what it stands for."""

    def note(self, step: Step) -> Noted | None:
        """Let the step's requests wait for its energy; None where its device has no meter."""
        own = step.device if step.device.startswith("gpu:") else "cpu"
        channels = self._channels_of(own)
        names = [item.request_id for item in step.work]
        for name in names:
            if name not in self.costs:
                self.costs[name] = Cost()
        if not channels:
            for name in names:
                self.costs[name].weaken(Quality.UNAVAILABLE)
            return None
        shares = fractions(step.work, self._coefficients.get(step.model, DEFAULTS))
        whole = sum(shares) or 1
        time_ns = 0 if step.device == BESIDE else step.ended_ns - step.started_ns
        noted = Noted(step, own, channels, names, shares, step.cpu_ns / whole, time_ns / whole)
        for name, share in zip(names, shares, strict=True):
            self.costs[name].waiting.append((noted, share))
        return noted

    def charge(self, device: str, claims: Sequence[tuple[Noted, Claim]]) -> None:
        """Share what steps took from one device among their requests.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        groups: dict[Charged, tuple[list[_Portion], list[_Portion]]] = {}
        for noted, claim in claims:
            for phase, names, shares, portion in _by_phase(noted, claim):
                active, idle = groups.setdefault(Charged(device, noted.step.model, phase, claim.quality), ([], []))
                active.append((portion.active_uj, names, shares))
                idle.append((portion.idle_uj, names, shares))
        for charged, (active, idle) in groups.items():
            number = self._number(charged)
            for name, energy_uj in charge(active).items():
                cost = self.costs[name]
                cost.active_uj += energy_uj
                cost.allocated_uj += energy_uj
                cost.charges[number] += energy_uj
                cost.weaken(charged.quality)
            for name, energy_uj in charge(idle).items():
                cost = self.costs[name]
                cost.allocated_uj += energy_uj
                cost.charges[number] += energy_uj
                cost.weaken(charged.quality)

    def settle(self, covered: Sequence[Noted], lost: Sequence[Noted]) -> None:
        """The energy of ``covered`` steps has been charged; ``lost`` ones will never have a reading, and their
        requests have no known bill."""
        for noted in (*covered, *lost):
            noted.waits = False
        for name in {name for noted in (*covered, *lost) for name in noted.names}:
            cost = self.costs[name]
            machine_ns = sum(noted.time_ns * share for noted, share in cost.waiting if not noted.waits)
            cost.machine_ns += machine_ns / self._executors
            cost.waiting = [entry for entry in cost.waiting if entry[0].waits]
        for name in {name for noted in lost for name in noted.names}:
            self.costs[name].weaken(Quality.UNAVAILABLE)

    def expect(self, cost: Cost) -> list[Claim] | None:
        """What the steps that wait for a reading will probably add; None where there is nothing to judge by."""
        expected = []
        for own in {noted.own for noted, _ in cost.waiting}:
            cpu_ns = sum(noted.cpu_ns * share for noted, share in cost.waiting if noted.own == own)
            time_ns = sum(noted.time_ns * share for noted, share in cost.waiting if noted.own == own)
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
        parts: Counter[tuple[str, Phase]] = Counter()
        for charged, energy_uj in self.charges(cost):
            parts[charged.device, charged.phase] += energy_uj
        return tuple(Part(device, phase, energy_uj) for (device, phase), energy_uj in parts.items())

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
        if own not in self._channels:
            return ()
        return tuple(channel for device, channel in self._channels.items() if device in (own, "cpu", "dram"))


_Portion = tuple[int, Sequence[str], Sequence[int]]
"""Energy, and who shares it how; see ``charge``."""


def _by_phase(noted: Noted, claim: Claim) -> Iterable[tuple[Phase, list[str], list[int], Claim]]:
    """The entries of a step by phase, with what falls to them of its claim; nearly always there is one phase."""
    work = noted.step.work
    phases = sorted({item.phase for item in work})
    if len(phases) == 1:
        yield phases[0], noted.names, noted.shares, claim
        return
    members = [[i for i, item in enumerate(work) if item.phase is phase] for phase in phases]
    weights = [sum(noted.shares[i] for i in inside) for inside in members]
    active_uj, idle_uj = split(claim.active_uj, weights, phases), split(claim.idle_uj, weights, phases)
    for phase, inside, active, idle in zip(phases, members, active_uj, idle_uj, strict=True):
        names, shares = [noted.names[i] for i in inside], [noted.shares[i] for i in inside]
        yield phase, names, shares, Claim(idle, active, claim.quality)


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_BEST_FIRST.index, default=Quality.UNAVAILABLE)
