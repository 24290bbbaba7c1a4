"""A clock that stands still until it is moved, and a meter that counts what it is told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from energy.attribution import DEFAULTS, Coefficients, share_load
from energy.clock import Clock
from energy.meters.base import Reading
from energy.types import UNSHARED, Bills, Phase, Quality, SettledRecord, Step, Work, load_of

MS = 1_000_000
S = 1_000_000_000


@dataclass
class HeldClock:
    now_ns: int = 50 * S
    cpu_ns: int = 3 * S
    wall_s: float = 1_700_000_000.0

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_ns, lambda: self.cpu_ns, lambda: self.wall_s)

    def run(self, ms: int, cpu_ms: int = 0) -> None:
        self.now_ns += ms * MS
        self.cpu_ns += cpu_ms * MS
        self.wall_s += ms / 1000


@dataclass
class CountingMeter:
    held: HeldClock
    energy_uj: dict[str, int] = field(default_factory=lambda: {"cpu": 0})
    resolution_ns: int = MS
    quality: Quality = Quality.MEASURED
    source: str = "powercap"
    name: str = "a counter"
    idle_uw: Mapping[str, int] = field(default_factory=dict)
    broken: bool = False

    def read(self) -> tuple[Reading, ...]:
        if self.broken:
            return ()
        return tuple(
            Reading(device, self.source, self.held.now_ns, energy_uj, self.resolution_ns, self.quality)
            for device, energy_uj in self.energy_uj.items()
        )


class Book:
    """A ledger that keeps everything, in memory."""

    def __init__(self) -> None:
        self.records: dict[str, SettledRecord] = {}

    def put(self, *bills: Bills) -> None:
        self.records |= {record.request.request_id: record for each in bills for record in each}

    def find(self, request_id: str) -> SettledRecord | None:
        return self.records.get(request_id)

    def close(self) -> None:
        pass


def step(
    held: HeldClock,
    ms: int,
    *works: Work,
    cpu_ms: int | None = None,
    device: str = "cpu:0",
) -> Step:
    """A step that ends now and does these works side by side; one core is busy for all of it unless said otherwise."""
    cpu_ns = (ms if cpu_ms is None else cpu_ms) * MS
    return step_of(together(*works), held.now_ns - ms * MS, held.now_ns, cpu_ns, device)


def step_of(
    work: Work | None,
    started_ns: int = 0,
    ended_ns: int = 1,
    cpu_ns: int = 1,
    device: str = "cpu:0",
    model: str = "tiny",
    passes: int = 1,
    padding_tokens: int = 0,
    coefficients: Coefficients = DEFAULTS,
) -> Step:
    """A step whose load is shared as an executor does it."""
    load_ns = load_of(device, ended_ns - started_ns, cpu_ns)
    shares = share_load(load_ns, work, passes, coefficients.of(work.phase)) if work else UNSHARED
    return Step(device, model, started_ns, ended_ns, cpu_ns, load_ns, work, shares, padding_tokens, passes)


def weigh(work: Work, coefficients: Coefficients, passes: int = 1) -> list[float]:
    """How requests share a step, in the plainest way: n times ``F / n + m * work_i``, the mean of its passes."""
    (fixed, token, context), n = coefficients.of(work.phase), len(work.tokens)
    contexts = work.context_tokens or [0] * n
    return [
        sum(fixed + n * (token * own + context * (found + own * number)) for number in range(passes)) / passes
        for own, found in zip(work.tokens, contexts, strict=True)
    ]


def encode(request_id: str, tokens: int = 10) -> Work:
    return Work(Phase.ENCODE, (request_id,), (tokens,))


def together(*works: Work) -> Work | None:
    """All of these, of one phase, in one step."""
    if not works:
        return None
    (phase,) = {work.phase for work in works}
    rows = [(work.request_ids, work.tokens, work.context_tokens) for work in works]
    return Work(phase, *(tuple(chain.from_iterable(row)) for row in zip(*rows, strict=True)))


def write_zone(folder: Path, name: str, energy_uj: int, range_uj: int = 262_143_328_850) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder
