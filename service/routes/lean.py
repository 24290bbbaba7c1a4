"""The short way to routes whose whole input is a JSON body: FastAPI documents them, and the rest of it is left out.

Its routers, dependencies, forms and exit stacks take more of the event loop than what such a route does itself
(docs/LOG.md). Knows no tasks.
"""

import json
from collections.abc import Iterable
from email.message import Message
from functools import lru_cache
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import EMPTY_BODY, UNREADABLE_BODY, MalformedBody, no_json


class JsonRoute(APIRoute):
    """A route that leaves FastAPI's way where its endpoint takes a body and the request, and nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        wants = self.dependant
        others = (wants.path_params, wants.query_params, wants.header_params, wants.cookie_params, wants.dependencies)
        self.is_lean = self.body_field is not None and not any(others)
        """Whether it does."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ``MalformedBody``, ``RequestValidationError`` and what the endpoint raises."""
        if not self.is_lean or scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)
            return
        request = Request(scope, receive, send)
        # ``Edge`` has read it, and gives it in one piece.
        content = (await receive())["body"]
        response = await self.endpoint(self._read(content, request.headers.get("content-type", "")), request)
        await response(scope, receive, send)

    def _read(self, content: bytes, content_type: str) -> Any:
        """The body as the endpoint wants it."""
        if not content:
            raise MalformedBody(EMPTY_BODY)
        # What is not said to be JSON stays bytes, which no model takes.
        told = _loaded(content) if _is_json(content_type) else content
        assert self.body_field is not None
        body, complaints = self.body_field.validate(told, loc=("body",))
        if complaints:
            raise RequestValidationError(complaints, body=told)
        return body


class Shortcut:
    """ASGI middleware: takes what is posted to a lean route there at once, past routers that would look for it."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._routes = {route.path: route for route in routes if isinstance(route, JsonRoute) and route.is_lean}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (self._app if route is None else route.handle)(scope, receive, send)


def _loaded(content: bytes) -> Any:
    try:
        return from_json(content)
    except ValueError:
        return _read_slowly(content)


def _read_slowly(content: bytes) -> Any:
    """What the faster reader does not know, or cannot say what is wrong with."""
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise no_json(error.msg, error.pos) from None
    except (ValueError, RecursionError):
        # No text in any encoding of JSON, too deep, or a number of too many digits.
        raise MalformedBody(UNREADABLE_BODY) from None


@lru_cache
def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))
