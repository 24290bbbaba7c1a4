"""How much a key may ask for in a minute: buckets that fill steadily. Knows nothing of requests or of HTTP."""

from collections.abc import Callable

_S_PER_MINUTE = 60.0


class Rate:
    """A token bucket: it fills at ``per_minute`` and holds a minute's worth; None has no bottom.

    More may be taken than there is, where only the end shows how much it was; whoever comes next waits for it. What is
    larger than a minute's worth passes when the bucket is full, or it could never pass.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute or 0)
        self._looked_s = clock()

    def wait_s(self, amount: float) -> float:
        """How long until ``amount`` may be taken; 0 is now."""
        if self.per_minute is None:
            return 0.0
        self._fill(self.per_minute)
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing * _S_PER_MINUTE / self.per_minute)

    def take(self, amount: float) -> None:
        """Take ``amount``; less than nothing gives back."""
        if self.per_minute is not None:
            self._fill(self.per_minute)
            self._level = min(self._level - amount, float(self.per_minute))

    def _fill(self, per_minute: int) -> None:
        now_s = self._clock()
        gained = (now_s - self._looked_s) * per_minute / _S_PER_MINUTE
        self._level = min(self._level + gained, float(per_minute))
        self._looked_s = now_s
