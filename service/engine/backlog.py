"""What waits for its first step: how much may, and how long it will take. Pure bookkeeping."""

from service.engine.types import Overloaded

# Of what was measured before, how much counts beside a new step; about the last fifty steps do.
_MEMORY = 0.98
_LEAST_WAIT_S = 0.1
_LONGEST_WAIT_S = 60.0


class Backlog:
    """Counts waiting items and their tokens, by key, and how fast tokens leave."""

    def __init__(self, max_items: int, max_tokens: int, key_share: float = 1.0) -> None:
        """One key may fill ``key_share`` of the queue."""
        self.items = self.tokens = 0
        self.by_key: dict[str, tuple[int, int]] = {}
        """Items and tokens of each key that waits."""
        self._max_items, self._max_tokens, self._key_share = max_items, max_tokens, key_share
        self._left_tokens = self._seconds = 0.0

    def enter(self, items: int, tokens: int, key: str = "") -> None:
        """Count items in, all or none. Raises ``Overloaded`` where they are too many beside those that wait.

        Whatever finds nobody waiting may enter, or what is larger than the limits could never be served; likewise
        what finds none of its key, within the limits of all.
        """
        own_items, own_tokens = self.by_key.get(key, (0, 0))
        if self._is_over(self.items, items, self.tokens, tokens, 1.0):
            raise Overloaded(self.wait_s())
        if key and self._is_over(own_items, items, own_tokens, tokens, self._key_share):
            raise Overloaded(self.wait_s())
        self._count(items, tokens, key)

    def leave(self, items: int, tokens: int, key: str = "") -> None:
        """Count items out: they are being computed, or nobody wants them any more."""
        self._count(-items, -tokens, key)

    def _is_over(self, items: int, more_items: int, tokens: int, more_tokens: int, share: float) -> bool:
        return bool(items) and (
            items + more_items > share * self._max_items or tokens + more_tokens > share * self._max_tokens
        )

    def _count(self, items: int, tokens: int, key: str) -> None:
        self.items += items
        self.tokens += tokens
        own_items, own_tokens = self.by_key.get(key, (0, 0))
        if own_items + items:
            self.by_key[key] = own_items + items, own_tokens + tokens
        else:
            self.by_key.pop(key, None)

    def stepped(self, tokens: int, seconds: float) -> None:
        """A step of all executors' time lasted ``seconds``, and ``tokens`` had left for it."""
        self._left_tokens = _MEMORY * self._left_tokens + tokens
        self._seconds = _MEMORY * self._seconds + seconds

    def wait_s(self) -> float:
        """How long the waiting tokens take to leave, at the speed of the latest steps."""
        if not self._left_tokens:
            return 1.0
        return min(max(self.tokens * self._seconds / self._left_tokens, _LEAST_WAIT_S), _LONGEST_WAIT_S)
