"""JSON by orjson: NaN and infinity become null, and what orjson refuses does no harm. Knows no HTTP."""

from typing import Any

import orjson

_BITS = 63
"""Of the whole numbers that orjson surely writes."""


def as_json(content: Any) -> bytes:
    """``content`` as one line of JSON."""
    try:
        return orjson.dumps(content)
    except TypeError:
        # A caller's lone surrogate, quoted in an error's message, is no UTF-8; and a document's metadata may hold
        # numbers of any size.
        return orjson.dumps(_readable(content))


def _readable(content: Any) -> Any:
    match content:
        case str():
            return content.encode("utf-8", "replace").decode()
        case dict():
            return {_readable(key): _readable(value) for key, value in content.items()}
        case list():
            return [_readable(value) for value in content]
        case int() if content.bit_length() > _BITS:
            return orjson.Fragment(str(content))
        case _:
            return content
