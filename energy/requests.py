"""What open requests have cost so far, and what they probably will. Knows nothing of threads, ledgers or carbon."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from energy.attribution import DEFAULTS, Coefficients, charge, fractions
from energy.settlement import BESIDE, Channel, Claim
from energy.types import Part, Phase, Quality, Step

_BEST_FIRST = list(Quality)
Account = tuple[str, Phase, Quality]
"""Model, phase and quality of a charge."""


@dataclass(slots=True)
class Load:
    """Work that no reading covers yet."""

    cpu_ns: float = 0.0
    time_ns: float = 0.0
    """On executors."""


@dataclass(slots=True)
class Cost:
    """One request's."""

    charges: Counter[tuple[str, Account]] = field(default_factory=Counter)
    """Allocated energy by device and account."""
    active_uj: int = 0
    allocated_uj: int = 0
    machine_ns: float = 0.0
    """Time of the whole machine, of which an executor is a part."""
    quality: Quality | None = None
    """None as long as nothing has been charged."""
    waiting: int = 0
    """Entries of steps that no reading covers yet."""
    loads: dict[str, Load] = field(default_factory=dict)
    """Of those entries, by the device that the steps ran on."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What has been charged, by device and phase."""
        parts: Counter[tuple[str, Phase]] = Counter()
        for (device, (_, phase, _)), energy_uj in self.charges.items():
            parts[device, phase] += energy_uj
        return tuple(Part(device, phase, energy_uj) for (device, phase), energy_uj in parts.items())

    def weaken(self, quality: Quality) -> None:
        """Lower the quality to ``quality`` where that is worse."""
        if quality is not self.quality:
            self.quality = quality if self.quality is None else weakest((self.quality, quality))


@dataclass(frozen=True, slots=True)
class Noted:
    """A step on the books of its requests: what is left is to learn its energy."""

    step: Step
    own: str
    """The metered device that it ran on."""
    channels: tuple[Channel, ...]
    """The metered devices that it burnt energy on."""
    shares: list[int]
    """Of each entry of its work; see ``fractions``."""
    whole: int

    def covered(self) -> bool:
        """Whether every meter has been read since it ended."""
        return all(channel.read_ns >= self.step.ended_ns for channel in self.channels)


class Requests:
    """The open requests; whoever calls holds the account's lock."""

    def __init__(
        self, channels: Iterable[Channel], executors: int, coefficients: Mapping[str, Coefficients]
    ) -> None:
        self.costs: dict[str, Cost] = {}
        self._executors = executors
        self._coefficients = coefficients
        self._channels = {channel.device: channel for channel in channels}

    def note(self, step: Step) -> Noted | None:
        """Let the step's requests wait for its energy; None where its device has no meter."""
        own = step.device if step.device.startswith("gpu:") else "cpu"
        channels = self._channels_of(own)
        costs = [self._cost(item.request_id) for item in step.work]
        if not channels:
            for cost in costs:
                cost.weaken(Quality.UNAVAILABLE)
            return None
        shares = fractions(step.work, self._coefficients.get(step.model, DEFAULTS))
        whole = sum(shares) or 1
        noted = Noted(step, own, channels, shares, whole)
        cpu_ns, time_ns = self._per_share(noted)
        for cost, share in zip(costs, shares, strict=True):
            cost.waiting += 1
            load = cost.loads.get(own)
            if load is None:
                load = cost.loads[own] = Load()
            load.cpu_ns += cpu_ns * share
            load.time_ns += time_ns * share
        return noted

    def settled(self, steps: Sequence[Noted]) -> None:
        """These wait no longer: their energy has been claimed."""
        for noted in steps:
            cpu_ns, time_ns = self._per_share(noted)
            machine_ns = time_ns / self._executors
            for item, share in zip(noted.step.work, noted.shares, strict=True):
                cost = self.costs[item.request_id]
                cost.waiting -= 1
                load = cost.loads[noted.own]
                load.cpu_ns -= cpu_ns * share
                load.time_ns -= time_ns * share
                cost.machine_ns += machine_ns * share

    def lost(self, steps: Sequence[Noted]) -> None:
        """These will never have a reading: their requests have no known bill."""
        for noted in steps:
            for item in noted.step.work:
                cost = self.costs[item.request_id]
                cost.waiting -= 1
                cost.weaken(Quality.UNAVAILABLE)

    def charge(self, device: str, claims: Sequence[tuple[Noted, Claim]]) -> None:
        """Share what steps with work took from one device among their requests.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        keyed = [
            (noted, claim, [(item.request_id, (noted.step.model, item.phase, claim.quality)) for item in noted.step.work])
            for noted, claim in claims
        ]
        active_uj = charge((claim.active_uj, keys, noted.shares) for noted, claim, keys in keyed)
        idle_uj = charge((claim.idle_uj, keys, noted.shares) for noted, claim, keys in keyed)
        for energies, active in ((active_uj, True), (idle_uj, False)):
            for (request_id, account), energy_uj in energies.items():
                cost = self.costs[request_id]
                cost.allocated_uj += energy_uj
                cost.active_uj += energy_uj if active else 0
                cost.charges[device, account] += energy_uj
                cost.weaken(account[2])

    def expect(self, cost: Cost) -> list[Claim] | None:
        """What the steps that wait for a reading will probably add; None where there is nothing to judge by."""
        if not cost.waiting:
            return []
        expected = []
        for own, load in cost.loads.items():
            for channel in self._channels_of(own):
                claim = channel.expect(load.cpu_ns, load.time_ns)
                if claim is None:
                    return None
                expected.append(claim)
        return expected

    def open_uj(self, device: str) -> int:
        """What has been charged on ``device``."""
        return sum(
            energy_uj
            for cost in self.costs.values()
            for (charged, _), energy_uj in cost.charges.items()
            if charged == device
        )

    def _cost(self, request_id: str) -> Cost:
        cost = self.costs.get(request_id)
        if cost is None:
            cost = self.costs[request_id] = Cost()
        return cost

    def _channels_of(self, own: str) -> tuple[Channel, ...]:
        """The metered devices that a step on ``own`` burns energy on; none where that has no meter."""
        if own not in self._channels:
            return ()
        return tuple(channel for device, channel in self._channels.items() if device in (own, "cpu", "dram"))

    def _per_share(self, noted: Noted) -> tuple[float, float]:
        """CPU time and time on an executor per unit of a step's shares."""
        step = noted.step
        time_ns = 0 if step.device == BESIDE else step.ended_ns - step.started_ns
        return step.cpu_ns / noted.whole, time_ns / noted.whole


def weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_BEST_FIRST.index, default=Quality.UNAVAILABLE)
