"""How much of the processor short pieces of work take, measured now and then. Knows nothing of what they are.

Whoever asks the system for a thread's CPU time may lose the core in that moment, and the event loop keeps the
interpreter from everybody until it has it back: so it does not ask at every piece.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from energy.types import NOTHING_BESIDE, Beside, Phase

TIMED = 64
"""Of the requests of a kind, one of so many is measured."""
_LATEST = 0.25
"""Weight of the latest in the moving average."""
Taken = Mapping[Phase, Beside]
"""What requests that are alike have taken, each with its piece of a phase and those before it."""
_UNKNOWN: Taken = MappingProxyType({})


@dataclass(slots=True)
class _Kind:
    begun: int = 0
    cpu_ns: dict[Phase, int] = field(default_factory=dict)
    """Of one piece; in the order of the pieces."""
    taken: dict[Phase, Beside] = field(default_factory=dict)
    """Objects that requests share."""


class Pace:
    """The CPU time of pieces, by task, model and phase. Used by one thread."""

    def __init__(self) -> None:
        self._kinds: defaultdict[tuple[str, str], _Kind] = defaultdict(_Kind)

    def begin(self, task: str, model: str) -> Taken:
        """A request begins; returns what it will have taken. Of what is not in that, each piece must be measured and
        told: of the first request of a kind, of another now and then, and of phases that nobody had yet."""
        kind = self._kinds[task, model]
        kind.begun += 1
        return _UNKNOWN if kind.begun % TIMED == 1 else kind.taken

    def learn(self, task: str, model: str, phase: Phase, took_ns: int) -> Beside:
        """A piece took so long; returns what its request has taken with it, smoothed by what others took."""
        kind = self._kinds[task, model]
        known_ns = kind.cpu_ns.get(phase, took_ns)
        kind.cpu_ns[phase] = round(known_ns + _LATEST * (took_ns - known_ns))
        taken = NOTHING_BESIDE
        for each, cpu_ns in kind.cpu_ns.items():
            taken = kind.taken[each] = taken.with_more(each, cpu_ns)
        return kind.taken[phase]
