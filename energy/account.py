"""Steps in, bills out. Knows nothing of models or HTTP.

Every microjoule that the meter counts ends on the bill of one request or is unattributed for a stated reason; until
that is known it is open. Energy counts as attributed when its request is over.

Executors and the event loop only leave word of what happened: reading, settling and charging is the work of ``read``
and ``sample``, which a thread of its own calls (``energy.sampler``).
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import orjson
from numpy.typing import NDArray

from energy.balances import Costs
from energy.carbon import Carbon
from energy.clock import NS_PER_S, Clock
from energy.host import Neighbours
from energy.ledger import Ledger
from energy.meters.base import Meter
from energy.meters.observe import observe_idle
from energy.owner import Owner
from energy.requests import End, Noted, Rates, Requests, weaker, weakest
from energy.settlement import HORIZON_NS, Channel, Claim, Reason
from energy.types import (
    BESIDE,
    NOTHING_BESIDE,
    Beside,
    Bill,
    Bills,
    Ended,
    Load,
    Phase,
    Places,
    Quality,
    RequestRecord,
    SettledRecord,
    Step,
)

_log = logging.getLogger(__name__)
_requests_log = logging.getLogger("wattle.requests")
_NEVER_LATE = frozenset(("ok", "refused"))
"""Of a request that ended otherwise, a step may still be running."""
_LAST_READINGS = 5
_LAST_INTERVAL_S = 0.06
"""At the end, the slowest counter gets as many readings to cover the last steps: its steps are 100 ms long."""
_KEPT_AFTER_NS = NS_PER_S // 4
"""Nearly every bill is final when it is first looked at after so long. Of the others alone the ledger gets a
provisional one."""
_ALARM_SHARE = 100
"""A residual above a hundredth of what the meter counted is an alarm."""
_ALARM_INTERVAL_NS = 60 * NS_PER_S
_LINES_AT_ONCE = 128
"""Of the log: giving it each by itself takes longer, and so does a text as long as a thousand, for which the system
has to find pages."""
_NOWHERE = Places(())
"""Of bills that nobody knows."""


@dataclass(frozen=True, slots=True)
class MeterTotal:
    """One metered device: what it counted is settled (attributed or unattributed), open, or residual."""

    device: str
    source: str
    settled_uj: int
    residual_uj: int
    """What the books have lost: 0, or there is an error in them."""
    open_uj: int = 0
    """Counted and not yet settled: taken by requests that are not over, or by nobody yet."""


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


class Account:
    """The energy account of one process; every method may be called from any thread.

    Steps name their device ``cpu:<group>`` or ``gpu:<index>``; ``executors`` of them run side by side and share what
    the processor takes when idle. A step without work is warm-up. Every request that reached the engine must be
    closed, whatever became of it: its energy is open until then.
    """

    def __init__(
        self,
        meter: Meter,
        carbon: Carbon,
        ledger: Ledger | None,
        *,
        executors: int = 1,
        idle_uw: Mapping[str, int] | None = None,
        owner: Owner | None = None,
        neighbours: Neighbours | None = None,
        clock: Clock | None = None,
        on_settled: Callable[[Sequence[Bills]], None] | None = None,
    ) -> None:
        """Start counting. ``idle_uw`` is the idle power by device in microwatts, for devices of which the meter
        does not know it; where nobody does, half a second is spent watching.
        ``on_settled`` is told the final bills, on whichever thread settles them."""
        self._meter = meter
        self._carbon = carbon
        self._ledger = ledger
        self._owner = owner
        self._neighbours = neighbours or Neighbours()
        self._clock = clock or Clock()
        self._executors = executors
        self._on_settled = on_settled
        known = {**meter.idle_uw, **(idle_uw or {})}
        if any(reading.device not in known for reading in meter.read()):
            known = {**observe_idle(meter), **known}
        process_ns = self._clock.process_ns()
        self._channels = {
            first.device: Channel(first, process_ns, known[first.device], first.device in meter.idle_uw, executors)
            for first in meter.read()
            if first.device in known and (owner is None or owner.may_count(first.device))
        }
        self.is_metered = bool(self._channels)
        """Whether there is anything to share; where there is not, requests are only kept, with unknown bills."""
        self.quality = weakest(channel.quality for channel in self._channels.values())
        """The best that a bill can have here."""
        self._expected = weaker(self.quality, Quality.APPORTIONED)
        """Of what is expected, where anything is: it is never better than what no window measures."""
        self._g_per_uj = carbon.gco2e(1, 0)
        self.is_continuous = all(channel.is_continuous for channel in self._channels.values())
        """Whether nothing is learnt from reading more often than settling."""
        self.awake = threading.Event()
        """Set when there is something to sample."""
        self._steps: deque[Step] = deque()
        """As executors record them: appending takes no lock."""
        self._closed: deque[End] = deque()
        """As the event loop closes requests, likewise."""
        self._settling = threading.Lock()
        """Held by whoever reads meters and settles; guards the channels."""
        self._alarmed_ns: int | None = None
        self._lock = threading.Lock()
        """Guards what follows; held for microseconds, and taken after ``_settling``."""
        self._requests = Requests(self._channels.values())
        """Running ones, and those that are over but not settled."""
        self._rates: Mapping[str, Rates] = {}
        """What to expect by, as settled last. Replaced and never changed: reading it takes no lock."""
        self._over: list[End] = []
        """Those, in the order of their ends."""
        self._kept: set[str] = set()
        """Those among these of which the ledger has a provisional bill."""
        self._unattributed: Counter[tuple[str, Reason]] = Counter()

    @property
    def settles(self) -> bool:
        """Whether something waits for a reading."""
        return bool(self._steps or self._closed or self._requests.waiting or self._over)

    def record(self, step: Step) -> None:
        """A step has just ended; it is charged to its requests with one of the next samples."""
        if not self.is_metered:
            return
        is_first = not self._steps
        self._steps.append(step)
        if is_first:
            self.wake()

    def wake(self) -> None:
        """Sample soon: a reading close to the start of a step makes its figure sharp."""
        if not self.awake.is_set():
            self.awake.set()

    def read(self) -> None:
        """Read the meter; what has happened until then is settled with the next sample."""
        with self._settling:
            with self._lock:
                self._note()
            self._read(self._clock.monotonic_ns())

    def sample(self) -> None:
        """Read the meter, and settle what can be settled."""
        with self._settling:
            with self._lock:
                self._note()
                self._requests.part()
            now_ns = self._clock.monotonic_ns()
            self._read(now_ns)
            with self._lock:
                self._charge(now_ns)
                finished, provisional = self._finish(now_ns)
                self._watch_residual(now_ns)
        self._publish(finished, provisional)

    def bill(self, request_id: str) -> Bill:
        """What a running request has cost so far."""
        with self._lock:
            self._note()
            return self._provisional(request_id)

    def spent_uj(self, request_id: str) -> int | None:
        """What a running request has been allocated so far; None where some of that is unknown. Looked at again and
        again while it runs, so it is less than a bill."""
        with self._lock:
            self._note()
            charged_uj, quality = self._requests.balances.allocated_uj(request_id)
            _, expected_uj, expected = self._requests.expect_waiting(request_id)
        unknown = Quality.UNAVAILABLE in (quality or self.quality, expected)
        return None if unknown else charged_uj + expected_uj

    def close(
        self,
        ended: Ended,
        beside: Beside = NOTHING_BESIDE,
        loads: Sequence[Load] | None = None,
    ) -> Bill:
        """The request is over: what it probably cost. It is settled with the next samples.

        The final bill then goes to the ledger and the log, and ``find`` returns it. CPU time ``beside`` the executors
        should be little, as it is charged as if it had been spent only now. Whoever knows all ``loads`` of its steps
        spares a look into the books, which takes longer.
        """
        is_first = not self._closed
        self._closed.append((ended, self._clock.monotonic_ns(), beside))
        if is_first:
            self.wake()
        request_id = ended[0]
        if loads is None:
            return self.bill(request_id)
        # Between the steps of a model whatever is touched has left the caches: no further objects, calls or keywords.
        rates, active_uj, allocated_uj = self._rates, 0.0, 0.0
        try:
            for device, load_ns in loads:
                active, allocated = rates[device]
                active_uj += load_ns * active
                allocated_uj += load_ns * allocated
            # Who has neither costs nothing, where anything is known at all.
            if beside.cpu_ns or not loads:
                active, allocated = rates[BESIDE]
                active_uj += beside.cpu_ns * active
                allocated_uj += beside.cpu_ns * allocated
        except KeyError:
            # Nothing was settled yet to judge by.
            return Bill(request_id, None, None, None, Quality.UNAVAILABLE, False)
        whole_uj = round(allocated_uj)
        gco2e = whole_uj * self._g_per_uj
        # The constructor of a named tuple is Python, and takes as long as all of this.
        return tuple.__new__(Bill, (request_id, round(active_uj), whole_uj, gco2e, self._expected, False, ()))

    def find(self, request_id: str) -> SettledRecord | None:
        """A request that is over, with its bill; None where it is unknown, still running, or forgotten.

        Raises ``LedgerUnreadable`` where only the ledger could tell, and cannot be read.
        """
        with self._lock:
            self._note()
            for end in self._over:
                if end[0][0] == request_id:
                    return self._provisional_record(end)
        return None if self._ledger is None else self._ledger.find(request_id)

    def totals(self) -> Totals:
        """All energy counted so far and where it went, in one consistent snapshot. What the meter moves between two of
        them divided by their time is power, so it is read for each."""
        self.read()
        with self._settling, self._lock:
            return Totals(
                meters=tuple(self._balance().values()),
                attributed=tuple(self._attributions()),
                unattributed=tuple(Unattributed(*key, energy_uj) for key, energy_uj in self._unattributed.items()),
            )

    def shutdown(self) -> None:
        """Settle every request that is over as far as the meter goes, and write the ledger."""
        self.sample()
        for _ in range(_LAST_READINGS):
            if not self._requests.waiting:
                break
            time.sleep(_LAST_INTERVAL_S)
            self.sample()
        with self._settling, self._lock:
            self._note()
            self._requests.lose_all()
            self._expire(self._clock.monotonic_ns() + 1)
            finished = self._settle(self._over)
            self._over = []
        self._publish(finished, ())
        if self._owner is not None:
            self._owner.close()
        if self._ledger is not None:
            self._ledger.close()

    def _note(self) -> None:
        """Put what happened on the books: ends of requests first, for their steps were recorded before them."""
        if self._closed:
            closed = [self._closed.popleft() for _ in range(len(self._closed))]
            self._over += closed
            if self.is_metered:
                self._requests.note_beside(closed)
        if self._steps:
            self._requests.note([self._steps.popleft() for _ in range(len(self._steps))])

    def _read(self, now_ns: int) -> None:
        process_ns = self._clock.process_ns()
        for reading in self._meter.read():
            channel = self._channels.get(reading.device)
            if channel is None:
                continue
            others_ns = 0
            if channel.shared_with_others:
                others_ns = self._neighbours.busy_ns(now_ns, process_ns, reading.at_ns - channel.read_ns)
            owned = self._owner is None or self._owner.owns(channel.device)
            channel.advance(reading, process_ns, others_ns, owned)
        self._requests.window_ns = min((channel.window_ns for channel in self._channels.values()), default=0)

    def _charge(self, now_ns: int) -> None:
        """Let the steps that the readings cover take their energy, and give it to their requests."""
        horizon_ns = now_ns - HORIZON_NS
        covered = self._requests.covered(horizon_ns)
        claims: dict[Noted, list[Claim]] = {noted: [] for noted in covered}
        for device, channel in self._channels.items():
            burning = [noted for noted in covered if channel in noted.place.channels]
            for noted, claim in zip(burning, channel.settle(burning) if burning else (), strict=True):
                claims[noted].append(claim)
                if noted.phase is None:
                    self._unattributed[device, Reason.WARM_UP] += claim.idle_uj + claim.active_uj
        self._expire(horizon_ns)
        self._requests.charge(claims)
        self._rates = self._requests.learn_rates(claims)
        if self._carbon.assumptions.embodied_kg is not None:
            self._requests.occupy(covered)

    def _expire(self, before_ns: int) -> None:
        """What no step has taken from the windows that ended before is nobody's."""
        for device, channel in self._channels.items():
            for reason, energy_uj in channel.expire(before_ns):
                self._unattributed[device, reason] += energy_uj

    def _finish(self, now_ns: int) -> tuple[list[Bills], list[Bills]]:
        """The bills that are final, and those that the ledger gets as they are by now."""
        over, self._over = self._over, []
        if not self._requests.waiting and _NEVER_LATE.issuperset([request[3] for request, _, _ in over]):
            # Nearly always.
            return self._settle(over), []
        final: list[End] = []
        provisional: list[Bills] = []
        waiting = self._requests.are_waiting([request[0] for request, _, _ in over])
        for end, is_waiting in zip(over, waiting, strict=True):
            (request_id, _, _, status, _, _, _, _, _), at_ns, _ = end
            if not is_waiting and (status in _NEVER_LATE or now_ns - at_ns >= HORIZON_NS):
                final.append(end)
                continue
            self._over.append(end)
            if now_ns - at_ns >= _KEPT_AFTER_NS and request_id not in self._kept:
                provisional.append(Bills.of(self._provisional_record(end)))
                self._kept.add(request_id)
        return self._settle(final), provisional

    def _settle(self, final: Sequence[End]) -> list[Bills]:
        """Move requests that are over to the totals."""
        if not final:
            return []
        requests, ends_ns, _ = zip(*final, strict=True)
        times_s = self._began_s() + np.array(ends_ns) / NS_PER_S
        if self._kept:
            self._kept.difference_update([request[0] for request in requests])
        return [
            self._bills([requests[number] for number in numbers.tolist()], times_s[numbers], costs)
            for numbers, costs in self._requests.settle(requests)
        ]

    def _bills(self, requests: Sequence[Ended], times_s: NDArray[np.float64], costs: Costs) -> Bills:
        """The final bills of requests that are alike."""
        (_, task, model, status, *_, key), carbon = requests[0], self._carbon.assumptions
        quality, places, parts_uj = costs.quality or self.quality, costs.places, costs.parts_uj
        active_uj = allocated_uj = gco2e = None
        if quality is Quality.UNAVAILABLE:
            places, parts_uj = _NOWHERE, parts_uj[:, :0]
        else:
            active_uj, allocated_uj = costs.active_uj, costs.allocated_uj
            gco2e = self._carbon.gco2e(allocated_uj.astype(np.float64), costs.times_ns / self._executors)
        alike = task, model, status, key, quality, True, carbon, places
        return Bills(*alike, requests, times_s, parts_uj, active_uj, allocated_uj, gco2e)

    def _provisional(self, request_id: str) -> Bill:
        """What a request has cost by now."""
        costs = self._requests.balances.find(request_id)
        active_uj, allocated_uj, expected = self._requests.expect_waiting(request_id)
        # Of what was never charged anything, quality is that of the meters.
        quality = weaker(costs.quality or self.quality, expected)
        if quality is Quality.UNAVAILABLE:
            return Bill(request_id, None, None, None, quality, False)
        active_uj, allocated_uj = active_uj + int(costs.active_uj[0]), allocated_uj + int(costs.allocated_uj[0])
        gco2e = self._carbon.gco2e(allocated_uj, float(costs.times_ns[0]) / self._executors)
        parts = costs.places.parts(costs.parts_uj[0].tolist())
        return Bill(request_id, active_uj, allocated_uj, gco2e, quality, False, parts)

    def _provisional_record(self, end: End) -> SettledRecord:
        request, at_ns, _ = end
        time_s = self._began_s() + at_ns / NS_PER_S
        return SettledRecord(RequestRecord(*request), self._provisional(request[0]), time_s, self._carbon.assumptions)

    def _began_s(self) -> float:
        """The wall time at which the monotonic clock began: asking for it at every end takes the event loop longer."""
        return self._clock.unix_s() - self._clock.monotonic_ns() / NS_PER_S

    def _attributions(self) -> Iterator[Attributed]:
        for key, energy_uj in self._requests.attributed().items():
            yield Attributed(*key, energy_uj)

    def _balance(self) -> dict[str, MeterTotal]:
        """Where what each device counted is, by device."""
        settled: Counter[str] = Counter()
        for share in self._attributions():
            settled[share.device] += share.energy_uj
        for (device, _), energy_uj in self._unattributed.items():
            settled[device] += energy_uj
        charged = self._requests.open_uj()
        balance = {}
        for device, channel in self._channels.items():
            open_uj = channel.open_uj + charged[device]
            residual_uj = channel.meter_uj - settled[device] - open_uj
            balance[device] = MeterTotal(device, channel.source, settled[device], residual_uj, open_uj)
        return balance

    def _watch_residual(self, now_ns: int) -> None:
        """Say, once a minute at most, that the books do not balance."""
        if self._alarmed_ns is not None and now_ns - self._alarmed_ns < _ALARM_INTERVAL_NS:
            return
        self._alarmed_ns = now_ns
        for device, total in self._balance().items():
            meter_uj = self._channels[device].meter_uj
            if abs(total.residual_uj) * _ALARM_SHARE > meter_uj:
                _log.error(
                    "energy of %s does not balance: %d of %d uJ counted are on no account; bills are wrong by as much",
                    device,
                    total.residual_uj,
                    meter_uj,
                )

    def _publish(self, finished: Sequence[Bills], provisional: Sequence[Bills]) -> None:
        """Write bills to the ledger, and settled ones to the log; never under a lock."""
        if self._ledger is not None and (provisional or finished):
            self._ledger.put(*provisional, *finished)
        if self._on_settled is not None and finished:
            self._on_settled(finished)
        if finished and _requests_log.isEnabledFor(logging.INFO):
            for lines in chain.from_iterable(map(_as_lines, finished)):
                _requests_log.info(lines)


def _as_lines(bills: Bills) -> Iterator[str]:
    """Of JSON, some at once: the record's fields side by side, named as in the ledger, carbon assumptions below their
    own name."""
    alike = orjson.dumps(
        {
            "task": bills.task,
            "model": bills.model,
            "status": bills.status,
            "key": bills.key,
            "quality": bills.quality,
            "places": orjson.Fragment(bills.places.names),
            "carbon": bills.carbon,
        }
    )
    # What all have in common is put in afterwards: no text has quotes in it without a backslash before them.
    begin, end = b'{"time_s":', b"," + alike[1:]
    for first in range(0, len(bills), _LINES_AT_ONCE):
        some = slice(first, first + _LINES_AT_ONCE)
        rows = zip(*bills.columns(some), bills.parts_uj[some].tolist(), strict=False)
        lines = [
            {
                "time_s": time_s,
                "request_id": request_id,
                "input_tokens": read,
                "output_tokens": written,
                "queue_ms": queue_ms,
                "compute_ms": compute_ms,
                "active_uj": active_uj,
                "allocated_uj": whole_uj,
                "gco2e": gco2e,
                "parts_uj": parts_uj,
            }
            for request_id, time_s, read, written, queue_ms, compute_ms, active_uj, whole_uj, gco2e, parts_uj in rows
        ]
        yield (orjson.dumps(lines)[1:-2] + end).replace(b"}," + begin, end + b"\n" + begin).decode()
