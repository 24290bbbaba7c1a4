"""JSON responses, written by orjson."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from service.json_text import as_json


class JsonResponse(Response):
    """A response whose body is ``content`` as JSON."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(as_json(content), status, headers)
