"""The event loop as a desk at which one request's work is done at a time. Knows nothing of what the work is."""

import asyncio


class Desk:
    """Keeps the rounds of the event loop short: no two pieces of work are done in the same one.

    Where a step ends thirty texts at once, answering them takes tens of milliseconds; whoever comes meanwhile, most
    likely to be refused, is heard between two of them and not after the last.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def turn(self) -> None:
        """Wait, first come, first served; what the caller does before it next waits for anything is its piece."""
        await self._lock.acquire()
        asyncio.get_running_loop().call_soon(self._lock.release)
