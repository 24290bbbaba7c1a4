"""What requests of the past cost."""

import asyncio
from datetime import UTC, datetime

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from energy.types import SettledRecord
from service.errors import RecordNotFound, documented
from service.responses import JsonResponse
from service.routes.common import Energy, Timings, Usage, energy_of, service_of


class Assumptions(BaseModel):
    """What stands behind the grams of CO2e."""

    zone: str = Field(description="ISO 3166 code of the grid, or `world average`.")
    gco2e_per_kwh: float
    grid_source: str
    pue: float = Field(description="Power usage effectiveness of the site.")
    embodied_kg: float | None = Field(description="Carbon of making the machine; null where no bill includes any.")
    life_years: float


class RequestEnergy(BaseModel):
    """A request that is over, with its bill."""

    id: str
    task: str
    model: str
    status: str = Field(description="`ok`, `refused`, `cancelled`, `timed_out` or `failed`.")
    finished_at: datetime
    usage: Usage
    timings: Timings
    energy: Energy
    carbon: Assumptions


def energy_routes() -> APIRouter:
    """The account of single requests."""
    router = APIRouter(prefix="/v1/energy", tags=["energy"])

    @router.get(
        "/requests/{request_id}",
        operation_id="energy_of_request",
        summary="The bill of a request that is over",
        response_model=RequestEnergy,
        responses=documented(RecordNotFound),
    )
    async def find(request_id: str, http: Request) -> Response:
        record = await asyncio.to_thread(service_of(http).account.find, request_id)
        if record is None:
            raise RecordNotFound("no request of this id is over, or the ledger has forgotten it")
        return JsonResponse(_show(record).model_dump())

    return router


def _show(record: SettledRecord) -> RequestEnergy:
    request, carbon = record.request, record.carbon
    return RequestEnergy(
        id=request.request_id,
        task=request.task,
        model=request.model,
        status=request.status,
        finished_at=datetime.fromtimestamp(record.time_s, UTC),
        usage=Usage(input_tokens=request.input_tokens, output_tokens=request.output_tokens),
        timings=Timings(queue_ms=request.queue_ms, compute_ms=request.compute_ms),
        energy=energy_of(record.bill),
        carbon=Assumptions(
            zone=carbon.zone,
            gco2e_per_kwh=carbon.gco2e_per_kwh,
            grid_source=carbon.grid_source,
            pue=carbon.pue,
            embodied_kg=carbon.embodied_kg,
            life_years=carbon.life_years,
        ),
    )
