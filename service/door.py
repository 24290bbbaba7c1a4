"""Backpressure before any work is done: how many texts may be inside at once. Knows nothing of tokens or models."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.types import Overloaded

# Weight of the latest stay in the moving average; about the last twenty texts count.
_LATEST = 0.1


class Door:
    """Counts texts at entry, so that a list of texts meets the same limit as single ones. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0
        self._stay_s = 1.0

    @contextmanager
    def admit(self, texts: int) -> Iterator[None]:
        """Hold places for ``texts`` texts; raise ``Overloaded`` if that many aren't free."""
        wanted = self.inside + texts - self.limit
        if wanted > 0:
            # Little's law: with L inside that stay W seconds each, one leaves every W / L seconds.
            raise Overloaded(retry_after_s=wanted * self._stay_s / max(1, self.inside))
        entered = time.monotonic()
        self.inside += texts
        try:
            yield
        finally:
            self.inside -= texts
            self._stay_s += _LATEST * (time.monotonic() - entered - self._stay_s)
