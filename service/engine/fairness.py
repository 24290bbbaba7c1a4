"""Whose turn it is among keys that wait: pure bookkeeping over tokens. Knows nothing of queues, batches or clocks.

Each key has a counter of the tokens that were computed for it, and who has the least goes first (virtual token
counters: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024). So of two keys that wait all the time,
neither gets ahead by more than a window and what is being computed, and a single request is never behind another key's
burst.
"""

import heapq
from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """What waits."""

    @property
    def key(self) -> str:
        """Whose it is."""

    @property
    def tokens(self) -> int:
        """What beginning it costs."""


WaitingT = TypeVar("WaitingT", bound=Waiting)


class Turns:
    """The counters."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}

    def join(self, key: str, waiting: Collection[str]) -> None:
        """Something of ``key`` comes to wait beside what ``waiting`` keys have.

        Time in which it had nothing to ask for earns no credit: it starts level with the least served of them.
        """
        if key in waiting:
            return
        if not waiting:
            # Nobody is behind anybody.
            self._served.clear()
        least = min((self._served.get(other, 0) for other in waiting), default=0)
        self._served[key] = max(self._served.get(key, 0), least)

    def charge(self, key: str, tokens: int) -> None:
        """``tokens`` are computed for ``key``."""
        self._served[key] = self._served.get(key, 0) + tokens

    def first(self, waiting: Sequence[WaitingT], most: int) -> list[WaitingT]:
        """The ``most`` of ``waiting`` whose turn is next, in that order; those of one key stay in theirs."""
        queues: dict[str, deque[WaitingT]] = {}
        for each in waiting:
            queues.setdefault(each.key, deque()).append(each)
        # Of equals, who has waited longer.
        heap = [(self._served.get(key, 0), place, key) for place, key in enumerate(queues)]
        heapq.heapify(heap)
        chosen: list[WaitingT] = []
        while heap and len(chosen) < most:
            served, place, key = heap[0]
            each = queues[key].popleft()
            chosen.append(each)
            if queues[key]:
                heapq.heapreplace(heap, (served + each.tokens, place, key))
            else:
                heapq.heappop(heap)
        return chosen
