"""The native routes, one per task, all made by the same loop."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.core import Receipt
from service.errors import TABLE, MethodNotAllowed, RecordNotFound, RouteNotFound, documented
from service.responses import JsonResponse
from service.routes.common import Energy, energy_of, service_of
from service.tasks import TASKS
from service.tasks.base import Task

CLIENT_GONE = 499
"""Nobody reads this status; nginx's logs made it known."""

ResultT = TypeVar("ResultT", bound=BaseModel)
T = TypeVar("T")


class Usage(BaseModel):
    """Tokens that the model read and wrote, special tokens included."""

    input_tokens: int
    output_tokens: int


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float = Field(description="From submission to the first step.")
    compute_ms: float = Field(description="From the first step to the last.")


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
    router = APIRouter(prefix="/v1", tags=["tasks"])
    errors = documented(*(kind for kind in TABLE if kind not in (RouteNotFound, MethodNotAllowed, RecordNotFound)))
    for task in TASKS:
        router.add_api_route(
            f"/{task.name}",
            _endpoint(task),
            methods=["POST"],
            summary=task.summary,
            operation_id=task.name,
            response_model=TaskResponse[task.result],  # type: ignore[name-defined]
            responses=errors,
            openapi_extra={"requestBody": {"content": {"application/json": {"example": task.example}}}},
        )
    return router


def _endpoint(task: Task[Any, Any]) -> Callable[..., Awaitable[Response]]:
    async def endpoint(body: Any, http: Request) -> Response:
        work = service_of(http).run(task, body, http.state.request_id)
        receipt = await _unless_gone(http, work)
        return Response(status_code=CLIENT_GONE) if receipt is None else _respond(receipt)

    endpoint.__annotations__["body"] = task.request
    return endpoint


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None once the client has disconnected; then ``work`` is cancelled."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_departure(http))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _departure(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _respond(receipt: Receipt) -> JsonResponse:
    energy = energy_of(receipt.bill)
    response = TaskResponse[BaseModel](
        id=receipt.request_id,
        model=receipt.model.name,
        results=list(receipt.results),
        usage=Usage(input_tokens=receipt.input_tokens, output_tokens=receipt.output_tokens),
        timings=Timings(queue_ms=receipt.queue_ms, compute_ms=receipt.compute_ms),
        energy=energy,
    )
    headers = {
        "x-queue-time": f"{receipt.queue_ms:.3f}",
        "x-inference-time": f"{receipt.compute_ms:.3f}",
        "x-energy-quality": energy.quality,
    }
    if energy.allocated_j is not None:
        headers["x-energy-joules"] = f"{energy.allocated_j:.6f}"
    if energy.gco2e is not None:
        headers["x-energy-gco2e"] = f"{energy.gco2e:.9f}"
    return JsonResponse(response.model_dump(serialize_as_any=True), headers=headers)
