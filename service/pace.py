"""How much of the processor short pieces of work take, measured now and then. Knows nothing of what they are.

Whoever asks the system for a thread's CPU time may lose the core in that moment, and the event loop keeps the
interpreter from everybody until it has it back: so it does not ask at every piece.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

TIMED = 64
"""Of the pieces of a kind, one of so many is measured."""
_LATEST = 0.25
"""Weight of the latest in the moving average."""


@dataclass(slots=True)
class _Kind:
    begun: int = 0
    cpu_ns: float | None = None
    """Of one piece."""


class Pace:
    """The CPU time of pieces, by their kind. Used by one thread, for one piece at a time; the first is measured."""

    def __init__(self, clock_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._clock_ns = clock_ns
        self._kinds: dict[Hashable, _Kind] = {}
        self._began_ns: int | None = None

    def begin(self, kind: Hashable) -> None:
        """A piece begins."""
        known = self._kinds.setdefault(kind, _Kind())
        self._began_ns = self._clock_ns() if known.begun % TIMED == 0 else None
        known.begun += 1

    def end(self, kind: Hashable) -> int:
        """It has ended; returns what it took, or where it was not measured what others of its kind did."""
        known = self._kinds[kind]
        if self._began_ns is not None:
            took_ns = self._clock_ns() - self._began_ns
            before_ns = took_ns if known.cpu_ns is None else known.cpu_ns
            known.cpu_ns = before_ns + _LATEST * (took_ns - before_ns)
        return round(known.cpu_ns or 0)
