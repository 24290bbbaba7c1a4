"""What waits for its first step: how much may, and how long it will take. Pure bookkeeping."""

from service.engine.types import Overloaded

# Of what was measured before, how much counts beside a new step; about the last fifty steps do.
_MEMORY = 0.98
_LEAST_WAIT_S = 0.1
_LONGEST_WAIT_S = 60.0


class Backlog:
    """Counts waiting items and their tokens, and how fast tokens leave."""

    def __init__(self, max_items: int, max_tokens: int) -> None:
        self.items = self.tokens = 0
        self._max_items, self._max_tokens = max_items, max_tokens
        self._left_tokens = self._seconds = 0.0

    def enter(self, items: int, tokens: int) -> None:
        """Count items in, all or none. Raises ``Overloaded`` where they are too many beside those that wait.

        Whatever finds nobody waiting may enter, or what is larger than the limits could never be served.
        """
        if self.items and (self.items + items > self._max_items or self.tokens + tokens > self._max_tokens):
            raise Overloaded(self.wait_s())
        self.items += items
        self.tokens += tokens

    def leave(self, items: int, tokens: int) -> None:
        """Count items out: they are being computed, or nobody wants them any more."""
        self.items -= items
        self.tokens -= tokens

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step of all executors' time lasted ``seconds``, and ``tokens`` had left for it."""
        self._left_tokens = _MEMORY * self._left_tokens + tokens
        self._seconds = _MEMORY * self._seconds + seconds

    def wait_s(self) -> float:
        """How long the waiting tokens take to leave, at the speed of the latest steps."""
        if not self._left_tokens:
            return 1.0
        return min(max(self.tokens * self._seconds / self._left_tokens, _LEAST_WAIT_S), _LONGEST_WAIT_S)
