"""What routes share: the service behind them, a client that may leave, and what a bill looks like to it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel, Field
from starlette.types import Receive

from energy.ledger import LedgerUnreadable
from energy.types import Bill, Quality
from service.core import Receipt, Service
from service.errors import (
    TABLE,
    AdminOnly,
    ClassifierModelGone,
    ClassifierNotFound,
    ClassifierUnavailable,
    DocumentNotFound,
    MethodNotAllowed,
    ModelInUse,
    ModelRefused,
    RecordNotFound,
    RouteNotFound,
)

UJ_PER_J = 1_000_000
_ADMINISTRATION = (AdminOnly, ModelInUse, ModelRefused)
CLASSIFIER_ERRORS = (ClassifierNotFound, ClassifierModelGone, ClassifierUnavailable)
_ELSEWHERE = (
    RouteNotFound,
    MethodNotAllowed,
    RecordNotFound,
    DocumentNotFound,
    LedgerUnreadable,
    *_ADMINISTRATION,
    *CLASSIFIER_ERRORS,
)
TASK_ERRORS = tuple(kind for kind in TABLE if kind not in _ELSEWHERE)
"""What a task can end in."""

T = TypeVar("T")


class Energy(BaseModel):
    """What a request cost; null is unknown, never zero."""

    active_j: float | None = Field(description="Joules above idle.")
    allocated_j: float | None = Field(description="Joules with the request's share of idle.")
    gco2e: float | None = Field(description="Grams of CO2-equivalent of the allocated energy.")
    quality: Quality = Field(description="How far to trust the figures; the weakest part names the whole.")
    settled: bool = Field(description="Whether they are final; GET /v1/energy/requests/{id} has the final ones.")


class Usage(BaseModel):
    """Tokens that the model read and wrote, special tokens included."""

    input_tokens: int
    output_tokens: int


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    queue_ms: float = Field(description="From submission to the first step.")
    compute_ms: float = Field(description="From the first step to the last.")


def energy_of(bill: Bill) -> Energy:
    """The bill in joules."""
    return Energy(**energy_fields(bill))


def energy_fields(bill: Bill) -> dict[str, Any]:
    """What ``Energy`` holds; making one of it first takes several times as long."""
    return {
        "active_j": joules(bill.active_uj),
        "allocated_j": joules(bill.allocated_uj),
        "gco2e": bill.gco2e,
        "quality": bill.quality,
        "settled": bill.settled,
    }


def bill_headers(receipt: Receipt) -> dict[str, str]:
    """Time and energy of a request that is over, as headers; what is unknown has none."""
    times = {"x-queue-time": f"{receipt.queue_ms:.3f}", "x-inference-time": f"{receipt.compute_ms:.3f}"}
    return times | energy_headers(receipt.bill)


def energy_headers(bill: Bill) -> dict[str, str]:
    """A bill as headers; what is unknown has none."""
    headers: dict[str, str] = {"x-energy-quality": bill.quality}
    if bill.allocated_uj is not None:
        headers["x-energy-joules"] = f"{bill.allocated_uj / UJ_PER_J:.6f}"
    if bill.gco2e is not None:
        headers["x-energy-gco2e"] = f"{bill.gco2e:.9f}"
    return headers


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None once the client has disconnected; then ``work`` is cancelled."""
    working = asyncio.current_task()
    assert working is not None
    leaving = asyncio.create_task(_departure(receive, working))
    try:
        return await work
    except asyncio.CancelledError:
        # Taken back where it came from the departure, and from nobody else.
        if leaving.done() and not leaving.cancelled() and not working.uncancel():
            return None
        raise
    finally:
        leaving.cancel()


async def _departure(receive: Receive, working: "asyncio.Task[Any]") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    working.cancel()


def service_of(request: Request) -> Service:
    """The service that the application's lifespan has built."""
    return cast(Service, request.app.state.service)


def joules(energy_uj: float | None) -> float | None:
    """Microjoules in joules; unknown stays unknown."""
    return None if energy_uj is None else energy_uj / UJ_PER_J
