"""Brings what threads compute to the event loop, all that is there with one waking. Knows nothing of what it is."""

import asyncio
from collections import deque
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Mailbox:
    """As ``asyncio.wrap_future``, which wakes the loop for every future and lets cancelling go back to it: a step ends
    many at once, and whoever submitted them cancels them anyway."""

    def __init__(self) -> None:
        self._arrived: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._is_rung = False
        """Whether the loop will look."""

    def wait(self, future: "Future[T]") -> "asyncio.Future[T]":
        """What becomes of ``future``; called on the loop."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[T] = loop.create_future()

        def arrive(done: "Future[T]") -> None:
            self._arrived.append((waiting, done))
            # Two threads may both ring; that none does cannot be, for the loop looks after it has set this back.
            if not self._is_rung and not loop.is_closed():
                self._is_rung = True
                loop.call_soon_threadsafe(self._hand_out)

        future.add_done_callback(arrive)
        return waiting

    def _hand_out(self) -> None:
        self._is_rung = False
        while self._arrived:
            waiting, done = self._arrived.popleft()
            if waiting.done():
                continue
            if done.cancelled():
                waiting.cancel()
            elif (error := done.exception()) is not None:
                waiting.set_exception(error)
            else:
                waiting.set_result(done.result())
