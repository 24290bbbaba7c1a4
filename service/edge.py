"""The outermost layer: every request gets an id, a caller and bounds, every failure an answer. Knows no routes.

What is too much is refused before anything is read of it, for a refusal must cost next to nothing. The door behind
the parsing counts texts; a request has at least one, so more requests than texts may be inside are known to be too
many as soon as they come.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.caller import Caller, calling
from service.door import Door
from service.errors import BodyTooLarge, HeadersTooLarge, MalformedBody, is_foreseen, render
from service.gate import Gate

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# One that never ends goes to the end: nothing is ever looked at twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+\\?+(?:"|\Z)', re.DOTALL)
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
# Whatever is answered is no page unless it says so itself, and is what its content-type says.
_SECURITY = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a request may be."""

    body_bytes: int
    header_bytes: int
    """Of all headers, and of the path and query."""
    json_depth: int
    """Levels of lists and objects inside each other."""


class Edge:
    """ASGI middleware.

    A request has two ids: ``state["request_id"]`` is ours, unique in the ledger; ``x-request-id`` echoes the
    caller's own where it sent a sane one, else it is ours. ``door`` counts the requests that post something.
    """

    def __init__(self, app: ASGIApp, bounds: Bounds, gate: Gate, door: Door) -> None:
        self._app, self._bounds, self._gate, self._door = app, bounds, gate, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            # Nothing here speaks it, so nothing that might one day is open unseen.
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # In the order of time, as a UUID of version 7: the ledger's index grows at its end alone, at half the cost.
        request_id = f"req-{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"
        scope.setdefault("state", {})["request_id"] = request_id
        # The first of several of one name counts.
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        callers = headers.get("x-request-id", "")
        shown = callers if _SANE_ID.fullmatch(callers) else request_id
        posts = scope["method"] == "POST"
        started = False
        who = Caller()

        async def send_dressed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = _dressed(message.get("headers", ()), shown)
            await send(message)

        try:
            self._check_headers(scope, headers)
            # Whoever may not enter is told so before the body is read, unless that brings the key.
            waits = self._gate.waits_for_body(scope["path"], headers)
            if not waits:
                who = self._gate.admit(scope["method"], scope["path"], headers)
            if posts:
                self._door.require(1, key=who.key)
            body = await self._read(headers, receive)
            if body is None:
                return
            if waits:
                who = self._gate.admit(scope["method"], scope["path"], headers, body)
            place = self._door.admit(1, key=who.key) if posts else nullcontext()
            # HEAD is answered as GET is (RFC 9110); the server leaves out the body.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            with place, calling(Caller(who.key, who.rates, who.timeout_s, len(body))):
                await self._app(asked, _replay(body, receive), send_dressed)
        except Exception as error:
            if not is_foreseen(error):
                _log.exception("request %s (%s) of %s failed", request_id, shown, who.name or "anyone")
            if started:
                raise
            await render(error)(scope, receive, send_dressed)

    def _check_headers(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raise ``HeadersTooLarge``, and ``MalformedBody`` for what RFC 9112 or we cannot read."""
        size, hosts = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b""), 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            hosts += name == b"host"
        if size > self._bounds.header_bytes:
            raise HeadersTooLarge(self._bounds.header_bytes)
        if hosts > 1 or (not hosts and scope.get("http_version") == "1.1"):
            raise MalformedBody("a request needs the header host, once")
        coding = headers.get("content-encoding") or "identity"
        if coding.lower() != "identity":
            raise MalformedBody(f"the content-encoding {coding} is not read; send the body as it is")

    async def _read(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body, or None if the caller has gone.

        Raises ``BodyTooLarge`` as soon as that is known, and ``MalformedBody`` for JSON that is nested too deeply.
        """
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._bounds.body_bytes:
            raise BodyTooLarge(self._bounds.body_bytes)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._bounds.body_bytes:
                raise BodyTooLarge(self._bounds.body_bytes)
            if not message.get("more_body", False):
                break
        if "json" in headers.get("content-type", "") and nesting(body, self._bounds.json_depth) > (
            self._bounds.json_depth
        ):
            raise MalformedBody(f"the body is nested deeper than the {self._bounds.json_depth} levels allowed")
        return bytes(body)


def nesting(body: bytes | bytearray, enough: int) -> int:
    """How many brackets of a JSON text are open at once, at most; not counted further where fewer than ``enough``
    open at all. Brackets in strings are none."""
    opened = body.count(b"[") + body.count(b"{")
    if opened <= enough:
        return opened
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NO_BRACKET), dtype=np.uint8)
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.where(opens, 1, -1).cumsum().max(initial=0))


def _dressed(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """An answer's headers with those that every answer has."""
    dressed = [header for header in headers if header[0] != b"x-request-id"]
    told = {header[0] for header in dressed}
    dressed.append((b"x-request-id", request_id.encode("latin-1")))
    dressed += [header for header in _SECURITY if header[0] not in told]
    return dressed


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
