"""Refuses what is too much before anything is read of it: a refusal must cost next to nothing. Knows no tasks.

The door behind it counts texts, which takes parsing; a request has at least one, so more requests than texts may be
inside are known to be too many as soon as they come.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from service.caller import caller
from service.door import Door


class Admission:
    """ASGI middleware: at most ``limit`` requests that post something are inside at once, ``key_share`` of them one
    key's."""

    def __init__(self, app: ASGIApp, limit: int, key_share: float) -> None:
        self._app = app
        self._door = Door(limit, key_share=key_share)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises ``Overloaded`` and ``TooManyAtOnce``, which the edge answers."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._door.admit(1, key=caller().key):
            await self._app(scope, receive, send)
