"""Backpressure before any work is done: how much may be inside at once. Knows nothing of tokenizers or models."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.engine.types import Overloaded
from service.errors import TooManyAtOnce
from service.keys import Key

# Weight of the latest stay in the moving average; of a full house about the last twenty requests count.
_LATEST = 0.1
_LEAST_WAIT_S = 0.1


class Door:
    """Counts texts and, roughly, their tokens at entry, so that a list of texts meets the same limits as single ones.

    A key may fill ``key_share`` of the places and no more. Whatever finds the place empty may enter, or what is larger
    than a limit could never be served. Not thread-safe.

    Whoever is refused is told when a place will be free that nobody else was told of: sent back all at once, of a
    hundred one would find it.
    """

    def __init__(
        self,
        limit: int,
        token_limit: int | None = None,
        key_share: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self._token_limit, self._key_share, self._clock = limit, token_limit, key_share, clock
        self.inside = 0
        self._tokens_inside = 0
        self._inside_of: Counter[str] = Counter()
        self._counted_s = clock()
        self._occupied_s = 0.0
        """How long places were taken, all of them added up."""
        self._gap_s = 1.0 / limit
        """Between two texts that leave."""
        self._promised_s = clock()
        """Until when the places that become free are promised."""

    @contextmanager
    def admit(self, texts: int, tokens: int = 0, key: Key | None = None) -> Iterator[None]:
        """Hold places for ``texts`` texts of ``tokens`` tokens in all. Raises what ``require`` raises."""
        self.require(texts, tokens, key)
        name = "" if key is None else key.name
        self._count(name, texts, tokens)
        entered_s, occupied_s = self._counted_s, self._occupied_s
        try:
            yield
        finally:
            self._count(name, -texts, -tokens)
            self._learn(self._counted_s - entered_s, self._occupied_s - occupied_s)

    def require(self, texts: int, tokens: int = 0, key: Key | None = None) -> None:
        """Raise ``Overloaded`` where so many places aren't free, and ``TooManyAtOnce`` where the key has none left."""
        if self.inside + texts > self.limit:
            raise Overloaded(self._promise_s(self.inside + texts - self.limit, self.inside))
        if self.inside and self._token_limit is not None:
            over = self._tokens_inside + tokens - self._token_limit
            if over > 0:
                raise Overloaded(self._promise_s(over, self._tokens_inside))
        if key is None:
            return
        own = self._inside_of[key.name]
        over_share = own + texts - int(self._key_share * self.limit)
        if own and over_share > 0:
            raise Overloaded(max(self._leave_s(over_share, own), _LEAST_WAIT_S))
        if key.concurrency is not None and own + texts > key.concurrency:
            raise TooManyAtOnce(key.concurrency, max(self._leave_s(own + texts - key.concurrency, own), _LEAST_WAIT_S))

    def _learn(self, stay_s: float, occupied_s: float) -> None:
        """Little's law: where L are inside at the mean of a stay of W seconds, one leaves every W / L seconds.

        It is wanted of a full house: the emptier it was, the less a stay counts.
        """
        if occupied_s:
            inside = occupied_s / stay_s
            self._gap_s += _LATEST * min(1.0, inside / self.limit) * (stay_s / inside - self._gap_s)

    def _promise_s(self, wanted: int, inside: int) -> float:
        """Until ``wanted`` of ``inside`` texts or tokens have left that were promised to nobody yet.

        What is computed together leaves together: in half the time that all take, often none has.
        """
        now_s, all_s = self._clock(), self._leave_s(1, 1)
        promised_s = max(now_s + all_s / 2, self._promised_s) + self._leave_s(wanted, inside)
        self._promised_s = min(promised_s, now_s + all_s * 3 / 2)
        return max(self._promised_s - now_s, _LEAST_WAIT_S)

    def _leave_s(self, wanted: int, inside: int) -> float:
        """How long ``wanted`` of ``inside`` texts or tokens take to leave."""
        return self._gap_s * max(1, self.inside) * wanted / max(1, inside)

    def _count(self, name: str, texts: int, tokens: int) -> None:
        now_s = self._clock()
        self._occupied_s += self.inside * (now_s - self._counted_s)
        self._counted_s = now_s
        self.inside += texts
        self._tokens_inside += tokens
        self._inside_of[name] += texts
        if not self._inside_of[name]:
            del self._inside_of[name]
