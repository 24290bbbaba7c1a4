"""JSON responses by orjson: NaN and infinity become null, and text that is not Unicode does no harm."""

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response


class JsonResponse(Response):
    """A response whose body is ``content`` as JSON."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(as_json(content), status, headers)


def as_json(content: Any) -> bytes:
    """``content`` as one line of JSON."""
    try:
        return orjson.dumps(content)
    except TypeError:
        # A caller's lone surrogate, quoted in an error's message, is no UTF-8.
        return orjson.dumps(_readable(content))


def _readable(content: Any) -> Any:
    match content:
        case str():
            return content.encode("utf-8", "replace").decode()
        case dict():
            return {_readable(key): _readable(value) for key, value in content.items()}
        case list():
            return [_readable(value) for value in content]
        case _:
            return content
