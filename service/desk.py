"""The event loop as a desk at which few requests' work is done at a time. Knows nothing of what the work is."""

import asyncio

PIECES = 4
"""Of a round. Between two of them the interpreter changes hands, and the caches with it: four pieces, together one or
two milliseconds, are cheaper in a row."""


class Desk:
    """Keeps the rounds of the event loop short: no more than ``PIECES`` pieces of work are done in the same one.

    Where a step ends thirty texts at once, answering them takes tens of milliseconds; whoever comes meanwhile, most
    likely to be refused, is heard between some of them and not after the last.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(PIECES)

    async def turn(self) -> None:
        """Wait, first come, first served; what the caller does before it next waits for anything is its piece."""
        await self._places.acquire()
        asyncio.get_running_loop().call_soon(self._places.release)
