"""The thread that keeps an account up to date. Knows nothing of meters."""

import logging
import threading
from typing import Protocol, Self

IDLE_INTERVAL_S = 1.0
_TOGETHER = 10
"""Readings that are settled together: much of what settling costs, with its locks and the log, comes with each time,
not with each bill."""
_log = logging.getLogger(__name__)


class Sampled(Protocol):
    """What is sampled."""

    awake: threading.Event
    """Set when something happens that a sample is for."""

    is_continuous: bool
    """Whether nothing is learnt from reading more often than settling: what is read has no steps, as an estimate."""

    @property
    def settles(self) -> bool:
        """Whether something waits for the next sample."""

    def read(self) -> None:
        """Read the meters."""

    def sample(self) -> None:
        """Read the meters, and settle what was read since the last time."""


class Sampler:
    """While it is entered, reads every ``interval_s`` where there is something to settle, and samples at some of those
    readings; else it samples at once when something happens, and at least once a second."""

    def __init__(self, account: Sampled, interval_s: float) -> None:
        self._account = account
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread; what is not settled then is for the account's shutdown."""
        self._stop.set()
        self._account.awake.set()
        self._thread.join()

    def _run(self) -> None:
        together = 1 if self._account.is_continuous else _TOGETHER
        pause_s = self._interval_s * _TOGETHER / together
        readings = 0
        while not self._stop.is_set():
            self._account.awake.clear()
            try:
                if readings % together:
                    self._account.read()
                else:
                    self._account.sample()
            except Exception:
                # Bills must go on; whoever reads the account sees the gap.
                _log.exception("the meters were not sampled")
            readings += 1
            # However much happens, never more often than this.
            if not self._stop.wait(pause_s) and not self._account.settles:
                self._account.awake.wait(IDLE_INTERVAL_S)
                readings = 0
