"""Backpressure before any work is done: how much may be inside at once. Knows nothing of tokenizers or models."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.types import Overloaded
from service.errors import TooManyAtOnce
from service.keys import Key

# Weight of the latest stay in the moving average; about the last twenty texts count.
_LATEST = 0.1


class Door:
    """Counts texts and, roughly, their tokens at entry, so that a list of texts meets the same limits as single ones.

    A key may fill ``key_share`` of the places and no more. Whatever finds the place empty may enter, or what is larger
    than a limit could never be served. Not thread-safe.
    """

    def __init__(self, limit: int, token_limit: int | None = None, key_share: float = 1.0) -> None:
        self.limit, self._token_limit, self._key_share = limit, token_limit, key_share
        self.inside = 0
        self._tokens_inside = 0
        self._inside_of: Counter[str] = Counter()
        self._stay_s = 1.0

    @contextmanager
    def admit(self, texts: int, tokens: int = 0, key: Key | None = None) -> Iterator[None]:
        """Hold places for ``texts`` texts of ``tokens`` tokens in all. Raises what ``require`` raises."""
        self.require(texts, tokens, key)
        name = "" if key is None else key.name
        entered = time.monotonic()
        self._count(name, texts, tokens)
        try:
            yield
        finally:
            self._count(name, -texts, -tokens)
            self._stay_s += _LATEST * (time.monotonic() - entered - self._stay_s)

    def require(self, texts: int, tokens: int = 0, key: Key | None = None) -> None:
        """Raise ``Overloaded`` where so many places aren't free, and ``TooManyAtOnce`` where the key has none left."""
        if self.inside + texts > self.limit:
            raise Overloaded(self._wait_s(self.inside + texts - self.limit, self.inside))
        if self.inside and self._token_limit is not None:
            over = self._tokens_inside + tokens - self._token_limit
            if over > 0:
                raise Overloaded(self._wait_s(over, self._tokens_inside))
        if key is None:
            return
        own = self._inside_of[key.name]
        over_share = own + texts - int(self._key_share * self.limit)
        if own and over_share > 0:
            raise Overloaded(self._wait_s(over_share, own))
        if key.concurrency is not None and own + texts > key.concurrency:
            raise TooManyAtOnce(key.concurrency, self._wait_s(own + texts - key.concurrency, own))

    def _wait_s(self, wanted: int, inside: int) -> float:
        """Little's law: with L inside that stay W seconds each, one leaves every W / L seconds."""
        return wanted * self._stay_s / max(1, inside)

    def _count(self, name: str, texts: int, tokens: int) -> None:
        self.inside += texts
        self._tokens_inside += tokens
        self._inside_of[name] += texts
        if not self._inside_of[name]:
            del self._inside_of[name]
