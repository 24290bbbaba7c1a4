"""The outermost layer: every request gets an id and a bounded body, every failure an answer. Knows no routes."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, render

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger(__name__)


class Edge:
    """ASGI middleware.

    A request has two ids: ``state["request_id"]`` is ours, unique in the ledger; ``x-request-id`` echoes the
    caller's own where it sent a sane one, else it is ours.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        callers = Headers(scope=scope).get("x-request-id", "")
        shown = callers if _SANE_ID.fullmatch(callers) else request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = shown
            await send(message)

        try:
            body = await self._read(scope, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), send_with_id)
        except Exception as error:
            if not isinstance(error, BodyTooLarge):
                _log.exception("request %s (%s) failed", request_id, shown)
            if started:
                raise
            await render(error)(scope, receive, send_with_id)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if the caller has gone. Raises ``BodyTooLarge`` as soon as that is known."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_body_bytes:
            raise BodyTooLarge(self._max_body_bytes)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body in one piece, and then whatever comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
