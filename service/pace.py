"""How much of the processor short pieces of work take, measured now and then. Knows nothing of what they are.

Whoever asks the system for a thread's CPU time may lose the core in that moment, and the event loop keeps the
interpreter from everybody until it has it back: so it does not ask at every piece.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from energy.types import NOTHING_BESIDE, Beside, Phase

TIMED = 64
"""Of the pieces of a kind, one of so many is measured."""
_LATEST = 0.25
"""Weight of the latest in the moving average."""


@dataclass(slots=True)
class _Kind:
    begun: int = 0
    cpu_ns: int = 0
    """Of one piece."""
    before: Beside | None = None
    after: Beside = NOTHING_BESIDE
    """That, and one piece: requests that are alike share it."""

    def add_to(self, before: Beside, phase: Phase) -> Beside:
        """What it makes with a piece more."""
        self.before, self.after = before, before.with_more(phase, self.cpu_ns)
        return self.after

    def learn(self, took_ns: int) -> None:
        """One piece took so long; the first has nothing to be averaged with."""
        self.cpu_ns = round(self.cpu_ns + _LATEST * (took_ns - self.cpu_ns)) if self.begun > 1 else took_ns


class Pace:
    """The CPU time of pieces, by task, model and phase. Used by one thread, for one piece at a time; the first of a
    kind is measured."""

    def __init__(self, clock_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._clock_ns = clock_ns
        self._kinds: defaultdict[tuple[str, str, Phase], _Kind] = defaultdict(_Kind)
        self._timed = _Kind(), NOTHING_BESIDE, Phase.PREPROCESS
        """Of the piece that is measured."""
        self.is_timed = False
        """Whether one has begun that is measured."""
        self._began_ns = 0

    def begin(self, task: str, model: str, phase: Phase, before: Beside) -> Beside:
        """A piece begins for who has taken so much ``before``; returns what that and others of its kind make. Where it
        ``is_timed``, its end must be told."""
        known = self._kinds[task, model, phase]
        self.is_timed = known.begun % TIMED == 0
        known.begun += 1
        if self.is_timed:
            self._timed, self._began_ns = (known, before, phase), self._clock_ns()
        return known.after if known.before is before else known.add_to(before, phase)

    def end(self) -> Beside:
        """It has ended; returns what it makes, smoothed by what others took."""
        self.is_timed = False
        kind, before, phase = self._timed
        kind.learn(self._clock_ns() - self._began_ns)
        return kind.add_to(before, phase)
