"""How much of the processor short pieces of work take, measured now and then. Knows nothing of what they are.

Whoever asks the system for a thread's CPU time may lose the core in that moment, and the event loop keeps the
interpreter from everybody until it has it back: so it does not ask at every piece.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

TIMED = 64
"""Of the pieces of a kind, one of so many is measured."""
_LATEST = 0.25
"""Weight of the latest in the moving average."""


@dataclass(slots=True)
class _Kind:
    begun: int = 0
    cpu_ns: int = 0
    """Of one piece."""

    def learn(self, took_ns: int) -> None:
        """One piece took so long; the first has nothing to be averaged with."""
        self.cpu_ns = round(self.cpu_ns + _LATEST * (took_ns - self.cpu_ns)) if self.begun > 1 else took_ns


class Pace:
    """The CPU time of pieces, by their kind. Used by one thread, for one piece at a time; the first is measured."""

    def __init__(self, clock_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._clock_ns = clock_ns
        self._kinds: defaultdict[Hashable, _Kind] = defaultdict(_Kind)
        self._kind = _Kind()
        """Of the piece that has begun."""
        self.is_timed = False
        """Whether one has begun that is measured."""
        self._began_ns = 0

    def begin(self, kind: Hashable) -> int:
        """A piece begins; returns what others of its kind took. Where it ``is_timed`` its end must be told."""
        self._kind = known = self._kinds[kind]
        self.is_timed = known.begun % TIMED == 0
        known.begun += 1
        if self.is_timed:
            self._began_ns = self._clock_ns()
        return known.cpu_ns

    def end(self) -> int:
        """It has ended; returns what it took, smoothed by what others did."""
        self.is_timed = False
        self._kind.learn(self._clock_ns() - self._began_ns)
        return self._kind.cpu_ns
