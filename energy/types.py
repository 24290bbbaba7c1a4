"""What the parts of the energy account exchange. Knows nothing of models or HTTP.

A *reading* comes from a *meter*; a *step* carries work per request; a *bill* is what one request is charged.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


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


class Work(NamedTuple):
    """One request's part in one step, in real tokens (padding is no request's work)."""

    request_id: str
    phase: Phase
    tokens: int
    """Tokens computed in this step."""
    context_tokens: int = 0
    """Tokens of the request that were already in its key/value buffers; of several passes, the sum."""


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass of one model on one device, or several in succession over the same texts, with the work for each
    request."""

    device: str
    """``cpu:<group>`` or ``gpu:<index>``: an executor's; ``cpu`` is work beside the executors."""
    model: str
    started_ns: int
    """Monotonic clock."""
    ended_ns: int
    cpu_ns: int
    """CPU time that the process spent during the step, over all threads of the device."""
    work: tuple[Work, ...]
    padding_tokens: int = 0
    passes: int = 1
    """How many forward passes it was; the work is that of all together."""

    @property
    def load_ns(self) -> int:
        """What its energy is shared by: on a processor CPU time, on a GPU time."""
        duration_ns = self.ended_ns - self.started_ns
        return duration_ns if self.device.startswith("gpu:") else self.cpu_ns or duration_ns


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
    """Metered devices and phases, in the order of the rows of ``Parts``, and how such are written as JSON."""

    def __init__(self, places: Iterable[tuple[str, Phase]]) -> None:
        """No device's name needs escaping."""
        self.all = tuple(places)
        names = [f'["{device}","{phase}"]' for device, phase in self.all]
        self.names = f"[{','.join(names)}]"


class Parts:
    """A bill's parts as a row of a table: most are only written down, and an object for each would take longer."""

    __slots__ = ("places", "row_uj")

    def __init__(self, places: Places, row_uj: tuple[int, ...]) -> None:
        """``row_uj`` has the energy at each of ``places``."""
        self.places, self.row_uj = places, row_uj

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Parts":
        """These, as such a row."""
        if isinstance(parts, cls):
            return parts
        every = tuple(parts)
        places = Places((part.device, part.phase) for part in every)
        return cls(places, tuple(part.energy_uj for part in every))

    def __iter__(self) -> Iterator[Part]:
        """Each of them."""
        for (device, phase), energy_uj in zip(self.places.all, self.row_uj, strict=True):
            yield Part(device, phase, energy_uj)

    def __eq__(self, other: object) -> bool:
        """Whether these are the same as others, however they are kept."""
        return isinstance(other, Iterable) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


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
    parts: Iterable[Part] = ()
    """What the allocated energy consists of, on bills in records; where they are not settled, what was charged by
    then."""


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
