"""Who asks: set once for each request where it comes in, so that no route has to hand it on, nor can forget to.

Whatever runs for a request, in tasks and threads too, finds its caller here. Knows no routes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from service.errors import RateExceeded
from service.keys import Key
from service.rates import Rate

_BYTES_PER_TOKEN = 4
"""Of English text, roughly: what a body is counted as before anything is tokenised."""


@dataclass(slots=True)
class Rates:
    """What a key has left of its minute."""

    requests: Rate
    tokens: Rate


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what is known of it before it is read."""

    key: Key | None = None
    """None where there are no keys, or the path needs none."""
    rates: Rates | None = None
    """Those of the key."""
    timeout_s: float | None = None
    """What the request's header allows it to take."""
    body_bytes: int = 0

    @property
    def name(self) -> str | None:
        """The key's name, for bills and logs."""
        return None if self.key is None else self.key.name

    @property
    def sees_only(self) -> str | None:
        """The name of the key whose bills alone the caller may see; None may see all."""
        return None if self.key is None or self.key.admin else self.key.name

    @property
    def tokens(self) -> int:
        """About how many tokens the request brings."""
        return self.body_bytes // _BYTES_PER_TOKEN

    def knock(self) -> None:
        """Count a request. Raises ``RateExceeded``."""
        if self.rates is not None:
            _require(self.rates.requests, 1, "requests")
            self.rates.requests.take(1)

    def count(self, number: int) -> "Count":
        """Count work as a ``number`` of requests, of which the knock was one. Raises ``RateExceeded``."""
        if self.rates is None:
            return Count(None, 0)
        requests, tokens = self.rates.requests, self.rates.tokens
        # As if it had not knocked: where it is refused, it costs nothing.
        requests.take(-1)
        _require(requests, number, "requests")
        _require(tokens, self.tokens, "tokens")
        requests.take(number)
        tokens.take(self.tokens)
        return Count(tokens, self.tokens)


@dataclass(slots=True)
class Count:
    """The tokens that a request was counted as, corrected as more becomes known."""

    _rate: Rate | None
    _tokens: int

    def correct(self, tokens: int) -> None:
        """It is ``tokens``."""
        if self._rate is not None:
            self._rate.take(tokens - self._tokens)
            self._tokens = tokens


_CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  # it is frozen


def caller() -> Caller:
    """Who sent the request that this runs for; nobody in particular outside of any."""
    return _CALLER.get()


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    """Inside it, ``caller()`` is ``who``."""
    token = _CALLER.set(who)
    try:
        yield
    finally:
        _CALLER.reset(token)


def _require(rate: Rate, amount: float, of: str) -> None:
    wait_s = rate.wait_s(amount)
    if wait_s > 0 and rate.per_minute is not None:
        raise RateExceeded(of, rate.per_minute, wait_s)
