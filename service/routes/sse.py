"""A request answered at once or, as server-sent events, while it is done. Knows no dialect.

A stream has a status as any other answer until the engine has taken the request; what fails later is its last event.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.core import Listener, Receipt
from service.errors import describe, is_foreseen, renaming
from service.json_text import as_json
from service.responses import JsonResponse
from service.routes.common import bill_headers, service_of, unless_gone
from service.tasks.base import Task, TaskRequest

MEDIA_TYPE = "text/event-stream"
CLIENT_GONE = 499
"""Nobody reads this status; nginx's logs made it known."""
KEEP_ALIVE_S = 10.0
"""Silence after which a comment is sent: proxies cut connections that seem dead."""

STALL_S = 60.0
"""How long a client may read nothing before its stream ends: what it has not read takes memory."""

_HEADERS = [
    (b"content-type", f"{MEDIA_TYPE}; charset=utf-8".encode()),
    # What is told piece by piece is neither kept nor gathered on its way.
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_log = logging.getLogger(__name__)


def event(content: Any, name: str | None = None) -> bytes:
    """``content`` as one event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + as_json(content) + b"\n\n"


def streamed(description: str) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI response of an operation that can also stream."""
    # The schema is of one event, as in OpenAPI 3.2.
    fields = {"data": {"type": "string", "contentMediaType": "application/json"}, "event": {"type": "string"}}
    schema = {"type": "object", "description": description, "properties": fields, "required": ["data"]}
    return {200: {"content": {MEDIA_TYPE: {"schema": schema}}}}


class Script(Protocol):
    """How a dialect tells a request: as a whole or, in the order of the other methods, in events."""

    @property
    def names(self) -> Mapping[str, str]:
        """What the dialect calls parameters of the task, where it differs."""

    def whole(self, receipt: Receipt) -> Any:
        """The request is over: its answer, to be JSON."""

    def opening(self, receipt: Receipt) -> Iterable[bytes]:
        """The engine has taken the request."""

    def piece(self, number: int, text: str) -> Iterable[bytes]:
        """The text of a number goes on so."""

    def closing(self, receipt: Receipt) -> Iterable[bytes]:
        """The request is over, and its texts are told."""


async def respond(http: Request, task: Task[Any, Any], request: TaskRequest, script: Script, stream: bool) -> Response:
    """Do what ``request`` asks and tell it by ``script``. Raises what ``service.errors`` knows how to answer."""
    if not stream:
        return await respond_whole(http, task, request, script.whole, script.names)
    return _EventStream(task, lambda listener: _run(http, task, request, script.names, listener), script)


async def respond_whole(
    http: Request,
    task: Task[Any, Any],
    request: TaskRequest,
    whole: Callable[[Receipt], Any],
    names: Mapping[str, str],
) -> Response:
    """The same for a dialect that never streams; see ``Script``."""
    receipt = await unless_gone(http.receive, _run(http, task, request, names))
    if receipt is None:
        return Response(status_code=CLIENT_GONE)
    return JsonResponse(whole(receipt), headers=bill_headers(receipt))


async def _run(
    http: Request,
    task: Task[Any, Any],
    request: TaskRequest,
    names: Mapping[str, str],
    listener: Listener | None = None,
) -> Receipt:
    with renaming(names):
        return await service_of(http).run(task, request, http.state.request_id, listener)


class _EventStream(Response):
    """Runs a request and answers it meanwhile; a client that leaves cancels it."""

    media_type = MEDIA_TYPE

    def __init__(
        self, task: Task[Any, Any], run: Callable[[Listener], Coroutine[Any, Any, Receipt]], script: Script
    ) -> None:
        super().__init__()
        self._task, self._run, self._script = task, run, script
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()
        """What is to be sent; None is the end."""
        self._accepted = False
        self._told: Counter[int] = Counter()
        """Characters told of each text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises what the request ends in before the engine has taken it."""
        await unless_gone(receive, self._answer(scope["state"]["request_id"], send))

    def accepted(self, receipt: Receipt) -> None:
        """See ``Listener``."""
        self._accepted = True
        self._put(self._script.opening(receipt))

    def wrote(self, number: int, piece: str) -> None:
        """See ``Listener``."""
        self._told[number] += len(piece)
        self._put(self._script.piece(number, piece))

    async def _answer(self, request_id: str, send: Send) -> None:
        working = asyncio.create_task(self._work(request_id))
        try:
            chunk = await self._chunks.get()
            if chunk is None:
                await working
            await _sent(send, {"type": "http.response.start", "status": 200, "headers": _HEADERS})
            while chunk is not None:
                await _sent(send, {"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await self._next()
            await _sent(send, {"type": "http.response.body", "body": b""})
        except _Stalled:
            # An answer that is not complete closes the connection.
            _log.info("request %s ended: its client has read nothing for %g s", request_id, STALL_S)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _work(self, request_id: str) -> None:
        try:
            receipt = await self._run(self)
            for number, result in enumerate(receipt.results):
                if rest := getattr(result, self._task.says)[self._told[number] :]:
                    self.wrote(number, rest)
            self._put(self._script.closing(receipt))
        except Exception as error:
            if not self._accepted:
                raise
            if not is_foreseen(error):
                _log.exception("request %s failed in its stream", request_id)
            self._put([event(describe(error).model_dump())])
        finally:
            self._chunks.put_nowait(None)

    def _put(self, events: Iterable[bytes]) -> None:
        self._chunks.put_nowait(b"".join(events))

    async def _next(self) -> bytes | None:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return await self._chunks.get()
        except TimeoutError:
            return b": keep-alive\n\n"


class _Stalled(Exception):
    """A client does not read."""


async def _sent(send: Send, message: Message) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await send(message)
    except TimeoutError:
        raise _Stalled from None
