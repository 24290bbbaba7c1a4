"""What the parts of the energy account exchange. Knows nothing of models or HTTP.

A *reading* comes from a *meter*; a *step* carries work per request; a *bill* is what one request is charged.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import repeat
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Quality(StrEnum):
    """How far a figure can be trusted, best first; the weakest part names the whole."""

    MEASURED = "measured"
    APPORTIONED = "apportioned"
    """From a real counter, but the step is shorter than the time between two readings."""
    ESTIMATED = "estimated"
    UNAVAILABLE = "unavailable"


class Phase(StrEnum):
    """What a step did for a request."""

    PREPROCESS = "preprocess"
    """Text to token ids; like ``POST``, on no executor."""
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"
    RETRIEVE = "retrieve"
    """Searched a knowledge base."""
    INDEX = "index"
    """Put documents into one."""
    POST = "post"
    """Token ids, or scores, to the answer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward pass does for its requests, side by side, in real tokens (padding is no request's work).

    Rows of names and numbers: an object for each of them would have left the caches when it is looked at again.
    """

    phase: Phase
    request_ids: Sequence[str]
    tokens: Sequence[int]
    """Of each, computed in the pass."""
    context_tokens: Sequence[int] = ()
    """Of each, already in its key/value buffers; empty where nobody has such. Else all compute equally many tokens."""


Shares = tuple[float, float, Sequence[int]]
"""What falls to each request of a step's load (``attribution.share_load``): nanoseconds in any case, nanoseconds for
each token by which requests differ, and how many of those each has."""
UNSHARED: Shares = 0.0, 0.0, ()
"""Of a step for no request, or where nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass of one model on one device, or several in succession over the same texts."""

    device: str
    """``cpu:<group>`` or ``gpu:<index>``: an executor's; ``cpu`` is work beside the executors."""
    model: str
    started_ns: int
    """Monotonic clock."""
    ended_ns: int
    cpu_ns: int
    """CPU time that the process spent during the step, over all threads of the device."""
    load_ns: int
    """See ``load_of``."""
    work: Work | None
    """Of the first pass; None where it was for no request. Each further one computes as many tokens, of which all
    requests then have equally many, and looks back on what those before it have computed."""
    shares: Shares
    padding_tokens: int = 0
    """Of a pass."""
    passes: int = 1

    @property
    def tokens(self) -> int:
        """That all passes computed for all requests."""
        return self.passes * sum(self.work.tokens) if self.work else 0

    @property
    def tokens_with_padding(self) -> int:
        """That all passes computed. Encoders compute real tokens alone, whatever their attention is padded to."""
        packs = self.work is not None and self.work.phase is Phase.ENCODE
        return self.tokens + (0 if packs else self.passes * self.padding_tokens)

    @property
    def context_tokens(self) -> int:
        """That all passes found in the buffers of all requests."""
        if self.work is None:
            return 0
        looked_back = self.passes * (self.passes - 1) // 2
        return self.passes * sum(self.work.context_tokens) + looked_back * sum(self.work.tokens)


BESIDE = "cpu"
"""The device of work beside the executors."""


def step_beside(model: str, request_id: str, phase: Phase, started_ns: int, ended_ns: int, cpu_ns: int) -> Step:
    """Work for one request beside the executors."""
    ended_ns = max(ended_ns, started_ns + 1)
    load_ns = load_of(BESIDE, ended_ns - started_ns, cpu_ns)
    work, shares = Work(phase, [request_id], [0]), (load_ns, 0.0, [0])
    return Step(BESIDE, model, started_ns, ended_ns, cpu_ns, load_ns, work, shares)


def load_of(device: str, duration_ns: int, cpu_ns: int) -> int:
    """What the energy of a step is shared by: on a processor CPU time, on a GPU time."""
    return duration_ns if device.startswith("gpu:") else cpu_ns or duration_ns


class Beside(NamedTuple):
    """CPU time that a request took beside the executors, of which no step was recorded. Many share one."""

    by_phase: Mapping[Phase, int]
    """In nanoseconds."""
    cpu_ns: int
    """Of all phases."""

    def with_more(self, phase: Phase, cpu_ns: int) -> "Beside":
        """This, and so much in a further phase."""
        return Beside({**self.by_phase, phase: cpu_ns}, self.cpu_ns + cpu_ns)


NOTHING_BESIDE = Beside(MappingProxyType({}), 0)


class Load(NamedTuple):
    """About what falls to one request of some steps on one device."""

    device: str
    """As in ``Step``."""
    load_ns: float
    """Of their loads."""


class Part(NamedTuple):
    """Allocated energy of a request on one metered device in one phase."""

    device: str
    phase: Phase
    energy_uj: int


class Places:
    """Metered devices and phases, in the order of the energies that a bill has at them."""

    def __init__(self, places: Iterable[tuple[str, Phase]]) -> None:
        """No device's name needs escaping."""
        self.all = tuple(places)
        names = [f'["{device}","{phase}"]' for device, phase in self.all]
        self.names = f"[{','.join(names)}]"
        """As JSON."""

    def parts(self, row_uj: Sequence[int]) -> tuple["Part", ...]:
        """A bill's parts, of which these are the energies."""
        return tuple(Part(*place, energy_uj) for place, energy_uj in zip(self.all, row_uj, strict=True))


class Bill(NamedTuple):
    """What one request is charged. ``None`` is unknown, never zero."""

    request_id: str
    active_uj: int | None
    """Energy above idle, in microjoules."""
    allocated_uj: int | None
    """Active energy and the request's share of idle, in microjoules."""
    gco2e: float | None
    """Grams of CO2-equivalent of the allocated energy."""
    quality: Quality
    settled: bool
    """Whether this is the final figure."""
    parts: Sequence[Part] = ()
    """What the allocated energy consists of, on bills in records; where they are not settled, what was charged by
    then."""


Ended = tuple[str, str, str, str, int, int, float, float, str | None]
"""The fields of a ``RequestRecord``. Plain where they are only kept, as there is one for every request."""


class RequestRecord(NamedTuple):
    """What the service knows of a request that is over."""

    request_id: str
    task: str
    model: str
    status: str
    """``ok``, ``refused`` (never reached the engine), or why it ended early: ``cancelled``, ``failed``, ..."""
    input_tokens: int = 0
    output_tokens: int = 0
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    key: str | None = None
    """A label of the API key that asked, never the key itself; None where there are no keys."""


@dataclass(frozen=True, slots=True)
class CarbonAssumptions:
    """What stands behind a figure of CO2e."""

    zone: str
    """ISO 3166 code, or ``world average``."""
    gco2e_per_kwh: float
    """Carbon intensity of the zone's grid."""
    grid_source: str
    pue: float
    embodied_kg: float | None
    """Carbon of making the machine; None where nobody has said, and then no figure includes any."""
    life_years: float
    machine_share: float = 1.0
    """How much of the machine the service has reserved."""


class SettledRecord(NamedTuple):
    """One request with its bill, as the ledger keeps it."""

    request: RequestRecord
    bill: Bill
    time_s: float
    """When the request was over, seconds since 1970 (UTC)."""
    carbon: CarbonAssumptions


@dataclass(frozen=True, slots=True)
class Bills:
    """The bills of requests that are alike, as columns: most are only written down and summed up, and an object for
    each would take longer than that. In a loop each is a ``SettledRecord``."""

    task: str
    model: str
    status: str
    key: str | None
    quality: Quality
    settled: bool
    carbon: CarbonAssumptions
    places: Places
    """Of the parts."""
    requests: Sequence[Ended]
    """With these tasks, models, statuses and keys; from here on a column has an entry for each."""
    times_s: NDArray[np.float64]
    parts_uj: NDArray[np.int64]
    """``(requests, places)``: the energy at each."""
    active_uj: NDArray[np.int64] | None
    allocated_uj: NDArray[np.int64] | None
    gco2e: NDArray[np.float64] | None
    """None where that is unknown of all of them."""

    @classmethod
    def of(cls, record: SettledRecord) -> "Bills":
        """A single one."""
        (request, bill, time_s, carbon), parts = record, record.bill.parts
        places = Places((part.device, part.phase) for part in parts)
        return cls(
            request.task,
            request.model,
            request.status,
            request.key,
            bill.quality,
            bill.settled,
            carbon,
            places,
            [request],
            np.array([time_s]),
            np.array([[part.energy_uj for part in parts]], np.int64),
            None if bill.active_uj is None else np.array([bill.active_uj]),
            None if bill.allocated_uj is None else np.array([bill.allocated_uj]),
            None if bill.gco2e is None else np.array([bill.gco2e]),
        )

    def __len__(self) -> int:
        """How many."""
        return len(self.requests)

    def __getitem__(self, number: int) -> SettledRecord:
        """One of them."""
        request = RequestRecord(*self.requests[number])
        bill = Bill(
            request.request_id,
            None if self.active_uj is None else int(self.active_uj[number]),
            None if self.allocated_uj is None else int(self.allocated_uj[number]),
            None if self.gco2e is None else float(self.gco2e[number]),
            self.quality,
            self.settled,
            self.places.parts(self.parts_uj[number].tolist()),
        )
        return SettledRecord(request, bill, float(self.times_s[number]), self.carbon)

    def columns(self, some: slice = slice(None)) -> Iterator[Iterable[Any]]:
        """Of all or ``some``, as Python's own numbers: ids, times, tokens read and written, milliseconds queued and
        computed, active and allocated energy, and grams."""
        ids, _, _, _, *usage, _ = zip(*self.requests[some], strict=True)
        yield from (ids, self.times_s[some].tolist(), *usage)
        for figures in (self.active_uj, self.allocated_uj, self.gco2e):
            yield repeat(None) if figures is None else figures[some].tolist()
