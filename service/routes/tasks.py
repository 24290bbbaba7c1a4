"""The native routes, one per task, all made by the same loop."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.core import Receipt
from service.errors import documented
from service.routes.common import TASK_ERRORS, Energy, Timings, Usage, energy_fields
from service.routes.lean import JsonRoute
from service.routes.sse import event, respond, streamed
from service.tasks import TASKS
from service.tasks.base import Task

_STREAM = """With `stream`: events `{"index": ..., "delta": ...}`, each the next piece of the text of that number, and
last the whole answer, as without `stream`. Where it fails, the last event is `{"error": ...}`."""

ResultT = TypeVar("ResultT", bound=BaseModel)


class TaskResponse(BaseModel, Generic[ResultT]):
    """The answer of every task."""

    id: str = Field(description="Names the request in the ledger.")
    model: str
    results: list[ResultT] = Field(description="One per text, in their order.")
    usage: Usage
    timings: Timings
    energy: Energy


def task_routes() -> APIRouter:
    """A route for every task of the tuple."""
    router = APIRouter(prefix="/v1", tags=["tasks"], route_class=JsonRoute)
    errors = documented(*TASK_ERRORS)
    for task in TASKS:
        router.add_api_route(
            f"/{task.name}",
            _endpoint(task),
            methods=["POST"],
            summary=task.summary,
            operation_id=task.name,
            response_model=TaskResponse[task.result],  # type: ignore[name-defined]
            responses=errors | (streamed(_STREAM) if "stream" in task.request.model_fields else {}),
            openapi_extra={"requestBody": {"content": {"application/json": {"example": task.example}}}},
        )
    return router


def _endpoint(task: Task[Any, Any]) -> Callable[..., Awaitable[Response]]:
    async def endpoint(body: Any, http: Request) -> Response:
        return await respond(http, task, body, Native(), stream=getattr(body, "stream", False))

    endpoint.__annotations__["body"] = task.request
    return endpoint


class Native:
    """Our own way to tell a request; see ``Script``."""

    names: Mapping[str, str] = {}

    def whole(self, receipt: Receipt) -> dict[str, Any]:
        """See ``Script``."""
        # As ``TaskResponse`` describes it, to which the tests hold it: made of it, an answer takes twice as long.
        return {
            "id": receipt.request_id,
            "model": receipt.model.name,
            "results": [result.model_dump() for result in receipt.results],
            "usage": {"input_tokens": receipt.input_tokens, "output_tokens": receipt.output_tokens},
            "timings": {"queue_ms": receipt.queue_ms, "compute_ms": receipt.compute_ms},
            "energy": energy_fields(receipt.bill),
        }

    def opening(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        return iter(())

    def piece(self, number: int, text: str) -> Iterator[bytes]:
        """See ``Script``."""
        yield event({"index": number, "delta": text})

    def closing(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        yield event(self.whole(receipt))
