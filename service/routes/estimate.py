"""What a request would cost, said before it runs."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from energy.prediction import COVERAGE
from energy.types import Quality
from models.manifest import Task as TaskName
from service.core import Estimate
from service.engine.types import EngineClosed
from service.errors import (
    DailyBudgetSpent,
    EnergyBudgetExceeded,
    KnowledgeBaseNotFound,
    KnowledgeUnavailable,
    documented,
)
from service.metrics import UJ_PER_J
from service.responses import JsonResponse
from service.routes.common import TASK_ERRORS, service_of
from service.routes.lean import JsonRoute
from service.tasks import TASKS

_TASKS = {task.name: task for task in TASKS}
_NOT_HERE = (EnergyBudgetExceeded, DailyBudgetSpent, KnowledgeBaseNotFound, KnowledgeUnavailable, EngineClosed)
"""What only a task can end in: nothing is spent, searched or computed."""


class EstimateRequest(BaseModel):
    """A task, and beside it what its own route takes."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    task: TaskName = Field(description="Name of a task; beside it stand the parameters of `POST /v1/{task}`.")


class ExpectedUsage(BaseModel):
    """Tokens, special ones included."""

    input_tokens: int = Field(description="Counted.")
    output_tokens: int | None = Field(description="Expected; null where nothing is known.")


class EstimatedEnergy(BaseModel):
    """What the request is expected to cost; null where nothing like it has been billed yet."""

    active_j: float | None = Field(description="Joules above idle.")
    allocated_j: float | None = Field(description="Joules with the request's share of idle.")
    low_j: float | None = Field(
        description=f"Lower end of `allocated_j` for {COVERAGE:.0%} of requests, as far off as the latest bills were; "
        "null before there are enough of them."
    )
    high_j: float | None = Field(description="Its upper end.")
    gco2e: float | None = Field(description="Grams of CO2-equivalent of the allocated energy.")
    quality: Quality = Field(description="`estimated`, or `unavailable` where nothing is known.")


class PredictionError(BaseModel):
    """How good the predictions for this task and model were."""

    median_relative: float | None = Field(
        description="Median of |predicted - billed| / billed; null before there are any."
    )
    requests: int = Field(description="Over how many of the latest requests.")


class EstimateResponse(BaseModel):
    """A bill before its time. Nothing has run on a model."""

    task: TaskName
    model: str = Field(description="Which model would do it.")
    usage: ExpectedUsage
    energy: EstimatedEnergy
    error: PredictionError


def estimate_routes() -> APIRouter:
    """The estimate."""
    router = APIRouter(prefix="/v1/energy", tags=["energy"], route_class=JsonRoute)
    example = {"task": TASKS[0].name, **TASKS[0].example}

    @router.post(
        "/estimate",
        operation_id="estimate_energy",
        summary="What a request would cost, before it runs",
        response_model=EstimateResponse,
        responses=documented(*(kind for kind in TASK_ERRORS if kind not in _NOT_HERE)),
        openapi_extra={"requestBody": {"content": {"application/json": {"example": example}}}},
    )
    async def estimate(body: EstimateRequest, http: Request) -> Response:
        task = _TASKS[body.task]
        try:
            request = task.request.model_validate(body.model_extra)
        except ValidationError as error:
            # As if it stood in a body of its own.
            complaints: list[Any] = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            raise RequestValidationError(complaints, body=body.model_extra) from None
        found = await service_of(http).estimate(task, request, http.state.request_id)
        return JsonResponse(_show(body.task, found).model_dump())

    return router


def _show(task: TaskName, found: Estimate) -> EstimateResponse:
    forecast = found.forecast
    if forecast is None:
        energy = EstimatedEnergy(
            active_j=None, allocated_j=None, low_j=None, high_j=None, gco2e=None, quality=Quality.UNAVAILABLE
        )
        error = PredictionError(median_relative=None, requests=0)
    else:
        low_uj, high_uj = forecast.interval_uj or (None, None)
        energy = EstimatedEnergy(
            active_j=forecast.active_uj / UJ_PER_J,
            allocated_j=forecast.allocated_uj / UJ_PER_J,
            low_j=None if low_uj is None else low_uj / UJ_PER_J,
            high_j=None if high_uj is None else high_uj / UJ_PER_J,
            gco2e=forecast.gco2e,
            quality=Quality.ESTIMATED,
        )
        error = PredictionError(median_relative=forecast.relative_error, requests=forecast.compared)
    usage = ExpectedUsage(
        input_tokens=found.input_tokens, output_tokens=None if forecast is None else forecast.output_tokens
    )
    return EstimateResponse(task=task, model=found.model.name, usage=usage, energy=energy, error=error)
