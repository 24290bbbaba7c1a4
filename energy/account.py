"""Steps in, bills out. Knows nothing of models or HTTP.

Every microjoule that the meter counts ends on the bill of one request or is unattributed for a stated reason; until
that is known it is the residual. Energy counts as attributed when its request is over.
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from energy.attribution import DEFAULTS, Coefficients, split, weigh
from energy.carbon import Carbon
from energy.clock import NS_PER_S, Clock
from energy.host import Neighbours
from energy.ledger import Ledger
from energy.meters.base import Meter
from energy.settlement import HORIZON_NS, Channel, Claim, Reason
from energy.types import Bill, Phase, Quality, RequestRecord, SettledRecord, Step

_log = logging.getLogger("wattle.requests")
_BEST_FIRST = list(Quality)
_NEVER_LATE = ("ok", "refused")
"""Of a request that ended otherwise, a step may still be running."""


@dataclass(frozen=True, slots=True)
class MeterTotal:
    """One metered device: ``settled_uj`` is what is attributed or unattributed by now, the rest is residual."""

    device: str
    source: str
    settled_uj: int
    residual_uj: int


@dataclass(frozen=True, slots=True)
class Attributed:
    """Energy on the bills of requests that are over."""

    device: str
    model: str
    task: str
    phase: Phase
    quality: Quality
    energy_uj: int


@dataclass(frozen=True, slots=True)
class Unattributed:
    """Energy on no bill, and why."""

    device: str
    reason: Reason
    energy_uj: int


@dataclass(frozen=True, slots=True)
class Totals:
    """One consistent snapshot: per device, ``settled_uj`` is the sum of attributed and unattributed."""

    meters: tuple[MeterTotal, ...]
    attributed: tuple[Attributed, ...]
    unattributed: tuple[Unattributed, ...]


@dataclass(slots=True)
class _Request:
    """What one request has cost, until its bill is settled."""

    charges: Counter[tuple[str, str, Phase, Quality]] = field(default_factory=Counter)
    """Allocated energy by device, model, phase and quality."""
    active_uj: int = 0
    allocated_uj: int = 0
    machine_ns: float = 0.0
    quality: Quality | None = None
    """None as long as it has computed nothing."""
    waiting: int = 0
    """Pairs of step and device that no reading covers yet."""

    def weaken(self, quality: Quality) -> None:
        if quality is not self.quality:
            self.quality = quality if self.quality is None else _weakest((self.quality, quality))


@dataclass(frozen=True, slots=True)
class _Over:
    """The end of a request."""

    record: RequestRecord
    time_s: float
    final_from_ns: int


class Account:
    """The energy account of one process; every method may be called from any thread.

    Steps name their device ``cpu:<group>`` or ``gpu:<index>``; ``executors`` of them run side by side and share what
    the processor takes when idle. A step without work is warm-up. Every request that reached the engine must be
    closed, whatever became of it: its energy is residual until then. Call ``sample`` when a request arrives and about
    once a second: readings close to the start of a step make its figure sharp.
    """

    def __init__(
        self,
        meter: Meter,
        carbon: Carbon,
        ledger: Ledger | None,
        *,
        executors: int = 1,
        idle_uw: Mapping[str, int] | None = None,
        coefficients: Coefficients = DEFAULTS,
        neighbours: Neighbours | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Start counting. ``idle_uw`` is the idle power by device in microwatts, for devices of which the meter
        does not know it; where nobody does, half a second is spent watching."""
        self._meter = meter
        self._carbon = carbon
        self._ledger = ledger
        self._executors = executors
        self._coefficients = coefficients
        self._neighbours = neighbours or Neighbours()
        self._clock = clock or Clock()
        known = {**meter.idle_uw, **(idle_uw or {})}
        if any(reading.device not in known for reading in meter.read()):
            known = {**observe_idle(meter), **known}
        process_ns = self._clock.process_ns()
        self._channels = {
            first.device: Channel(first, process_ns, known[first.device], first.device in meter.idle_uw, executors)
            for first in meter.read()
            if first.device in known
        }
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}
        """Running ones, and those that are over but not settled."""
        self._over: dict[str, _Over] = {}
        self._finished: list[SettledRecord] = []
        self._attributed: Counter[tuple[str, str, str, Phase, Quality]] = Counter()
        self._unattributed: Counter[tuple[str, Reason]] = Counter()

    @property
    def quality(self) -> Quality:
        """The best that a bill can have here."""
        return _weakest(channel.quality for channel in self._channels.values())

    def record(self, step: Step) -> None:
        """Charge a step that has just ended to its requests."""
        with self._lock:
            channels = self._channels_of(step)
            for request_id in {item.request_id for item in step.work}:
                request = self._requests.setdefault(request_id, _Request())
                request.waiting += len(channels)
                if not channels:
                    request.weaken(Quality.UNAVAILABLE)
            for channel in channels:
                channel.pending.append(step)
            self._read()

    def sample(self) -> None:
        """Read the meter if it has moved, and settle what can be settled."""
        with self._lock:
            self._read()
            now_ns = self._clock.monotonic_ns()
            self._give_up(now_ns - HORIZON_NS)
            for request_id in [one for one in self._over if self._is_final(one, now_ns)]:
                self._settle(request_id)
        self._publish()

    def bill(self, request_id: str) -> Bill:
        """What a running request has cost so far."""
        with self._lock:
            return self._bill(request_id, settled=False)

    def close(self, record: RequestRecord) -> Bill:
        """The request is over: its bill, final unless the meter has yet to cover one of its steps.

        The final one then goes to the ledger and the log, and ``find`` returns it.
        """
        provisional: SettledRecord | None = None
        with self._lock:
            self._read()
            now_ns = self._clock.monotonic_ns()
            final_from_ns = now_ns if record.status in _NEVER_LATE else now_ns + HORIZON_NS
            self._requests.setdefault(record.request_id, _Request())
            self._over[record.request_id] = _Over(record, self._clock.unix_s(), final_from_ns)
            if self._is_final(record.request_id, now_ns):
                bill = self._settle(record.request_id).bill
            else:
                provisional = self._over_record(record.request_id)
                bill = provisional.bill
        if provisional is not None and self._ledger is not None:
            self._ledger.put(provisional)
        self._publish()
        return bill

    def find(self, request_id: str) -> SettledRecord | None:
        """A request that is over, with its bill; None where it is unknown, still running, or forgotten."""
        self.sample()
        with self._lock:
            if request_id in self._over:
                return self._over_record(request_id)
        return None if self._ledger is None else self._ledger.find(request_id)

    def totals(self) -> Totals:
        """All energy counted so far and where it went."""
        self.sample()
        with self._lock:
            settled: Counter[str] = Counter()
            for (device, *_), energy_uj in self._attributed.items():
                settled[device] += energy_uj
            for (device, _), energy_uj in self._unattributed.items():
                settled[device] += energy_uj
            return Totals(
                meters=tuple(
                    MeterTotal(device, channel.source, settled[device], channel.meter_uj - settled[device])
                    for device, channel in self._channels.items()
                ),
                attributed=tuple(Attributed(*key, energy_uj) for key, energy_uj in self._attributed.items()),
                unattributed=tuple(Unattributed(*key, energy_uj) for key, energy_uj in self._unattributed.items()),
            )

    def shutdown(self) -> None:
        """Settle every request that is over as far as the meter goes, and write the ledger."""
        with self._lock:
            self._wait_for_readings()
            self._read()
            self._give_up(self._clock.monotonic_ns() + 1)
            for request_id in list(self._over):
                self._settle(request_id)
        self._publish()
        if self._ledger is not None:
            self._ledger.close()

    def _channels_of(self, step: Step) -> list[Channel]:
        """The metered devices that a step burns energy on; none where its own device has no meter."""
        own = _own_device(step)
        if own not in self._channels:
            return []
        return [channel for device, channel in self._channels.items() if device in (own, "cpu", "dram")]

    def _wait_for_readings(self) -> None:
        """Sleep until the meter can cover the steps that wait: a tenth of a second for the slowest."""
        due_ns = max((channel.due_ns for channel in self._channels.values() if channel.pending), default=0)
        time.sleep(max(0, due_ns - self._clock.monotonic_ns()) / NS_PER_S)

    def _read(self) -> None:
        """Take a reading where one is due, and settle the steps that it covers."""
        now_ns = self._clock.monotonic_ns()
        if not any(channel.due_ns <= now_ns for channel in self._channels.values()):
            return
        process_ns = self._clock.process_ns()
        for reading in self._meter.read():
            channel = self._channels.get(reading.device)
            if channel is None:
                continue
            others_ns = 0
            if channel.shared_with_others:
                others_ns = self._neighbours.busy_ns(now_ns, process_ns, reading.at_ns - channel.read_ns)
            if channel.advance(reading, process_ns, others_ns):
                for step, claim in channel.settle():
                    self._charge(channel.device, step, claim)
                for reason, energy_uj in channel.expire(now_ns - HORIZON_NS):
                    self._unattributed[channel.device, reason] += energy_uj

    def _charge(self, device: str, step: Step, claim: Claim) -> None:
        """Share what a step took from one device among its requests."""
        if not step.work:
            self._unattributed[device, Reason.WARM_UP] += claim.idle_uj + claim.active_uj
            return
        weights, active_uj, idle_uj = self._share(step, claim)
        machine_ns = (step.ended_ns - step.started_ns) / (self._executors * sum(weights))
        # A step is charged once for every metered device, but its time counts once.
        own = device == _own_device(step)
        for item, weight, active, idle in zip(step.work, weights, active_uj, idle_uj, strict=True):
            request = self._requests[item.request_id]
            request.active_uj += active
            request.allocated_uj += active + idle
            request.charges[device, step.model, item.phase, claim.quality] += active + idle
            request.weaken(claim.quality)
            if own:
                request.machine_ns += machine_ns * weight
        for request_id in {item.request_id for item in step.work}:
            self._requests[request_id].waiting -= 1

    def _share(self, step: Step, claim: Claim) -> tuple[list[int], list[int], list[int]]:
        """Weight, active and idle microjoules of every entry of the step's work.

        Idle energy is shared as active energy is: a step lasts as long as its work makes it last.
        """
        weights = weigh(step.work, self._coefficients)
        keys = [item.request_id for item in step.work]
        return weights, split(claim.active_uj, weights, keys), split(claim.idle_uj, weights, keys)

    def _give_up(self, before_ns: int) -> None:
        """A step that still waits for a reading then will never have one: its requests have no known bill."""
        for channel in self._channels.values():
            for step in channel.abandon(before_ns):
                for request_id in {item.request_id for item in step.work}:
                    self._requests[request_id].waiting -= 1
                    self._requests[request_id].weaken(Quality.UNAVAILABLE)

    def _is_final(self, request_id: str, now_ns: int) -> bool:
        return not self._requests[request_id].waiting and self._over[request_id].final_from_ns <= now_ns

    def _settle(self, request_id: str) -> SettledRecord:
        """Move a request that is over to the totals and hand its record to whoever publishes next."""
        settled = self._over_record(request_id, settled=True)
        request = self._requests.pop(request_id)
        del self._over[request_id]
        for (device, model, phase, quality), energy_uj in request.charges.items():
            self._attributed[device, model, settled.request.task, phase, quality] += energy_uj
        self._finished.append(settled)
        return settled

    def _over_record(self, request_id: str, settled: bool = False) -> SettledRecord:
        over = self._over[request_id]
        return SettledRecord(over.record, self._bill(request_id, settled), over.time_s, self._carbon.assumptions)

    def _bill(self, request_id: str, settled: bool) -> Bill:
        request = self._requests.get(request_id) or _Request()
        expected = self._expect(request_id) if request.waiting else []
        if expected is None:
            return Bill(request_id, None, None, None, Quality.UNAVAILABLE, settled)
        parts = [claim.quality for claim in expected] + ([request.quality] if request.quality else [])
        quality = _weakest(parts or [self.quality])
        if quality is Quality.UNAVAILABLE:
            return Bill(request_id, None, None, None, quality, settled)
        active_uj = request.active_uj + sum(claim.active_uj for claim in expected)
        allocated_uj = request.allocated_uj + sum(claim.active_uj + claim.idle_uj for claim in expected)
        gco2e = self._carbon.gco2e(allocated_uj, request.machine_ns)
        return Bill(request_id, active_uj, allocated_uj, gco2e, quality, settled)

    def _expect(self, request_id: str) -> list[Claim] | None:
        """What the steps that wait for a reading will probably add, without embodied carbon; None where there is
        nothing to judge by."""
        expected = []
        for channel in self._channels.values():
            for step in channel.pending:
                own = [i for i, item in enumerate(step.work) if item.request_id == request_id]
                if not own:
                    continue
                claim = channel.expect(step)
                if claim is None:
                    return None
                _, active_uj, idle_uj = self._share(step, claim)
                expected += [Claim(idle_uj[i], active_uj[i], claim.quality) for i in own]
        return expected

    def _publish(self) -> None:
        """Write settled records to the ledger and the log; never under the lock, and never on an executor."""
        with self._lock:
            finished, self._finished = self._finished, []
        for settled in finished:
            if self._ledger is not None:
                self._ledger.put(settled)
            _log.info("%s", _as_json(settled))


def observe_idle(meter: Meter, seconds: float = 0.5) -> dict[str, int]:
    """Mean power of each device in microwatts while the caller does nothing."""
    before = {reading.device: reading for reading in meter.read()}
    time.sleep(seconds)
    idle_uw = {}
    for now in meter.read():
        then = before.get(now.device)
        if then is not None and now.at_ns > then.at_ns:
            idle_uw[now.device] = (now.energy_uj - then.energy_uj) * NS_PER_S // (now.at_ns - then.at_ns)
    return idle_uw


def _own_device(step: Step) -> str:
    """The metered device that a step runs on."""
    return step.device if step.device.startswith("gpu:") else "cpu"


def _weakest(qualities: Iterable[Quality]) -> Quality:
    """The weakest names the whole; nothing at all is unavailable."""
    return max(qualities, key=_BEST_FIRST.index, default=Quality.UNAVAILABLE)


def _as_json(settled: SettledRecord) -> str:
    """One line: the record's fields side by side, carbon assumptions below their own name."""
    bill = asdict(settled.bill)
    del bill["settled"]
    line = {"time_s": settled.time_s, **asdict(settled.request), **bill, "carbon": asdict(settled.carbon)}
    return json.dumps(line, ensure_ascii=False)
