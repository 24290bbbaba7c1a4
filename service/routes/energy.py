"""What requests of the past cost, one by one and in sums."""

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from energy.account import Totals
from energy.ledger import LedgerUnreadable
from energy.report import By, Group, Report, read_moment, read_report
from energy.settlement import Reason
from energy.types import Phase, Quality, SettledRecord
from service.caller import caller
from service.errors import InvalidValue, RecordNotFound, UnknownParameter, documented
from service.responses import JsonResponse
from service.routes.common import UJ_PER_J, Energy, Timings, Usage, energy_of, joules, service_of


class Assumptions(BaseModel):
    """What stands behind the grams of CO2e."""

    zone: str = Field(description="ISO 3166 code of the grid, or `world average`.")
    gco2e_per_kwh: float
    grid_source: str
    pue: float = Field(description="Power usage effectiveness of the site.")
    embodied_kg: float | None = Field(description="Carbon of making the machine; null where no bill includes any.")
    life_years: float = Field(description="Life of the machine, over which its making is spread.")
    machine_share: float = Field(description="Share of the machine that the service has reserved.")


class PartOfBill(BaseModel):
    """What one device took in one phase."""

    device: str
    phase: Phase
    allocated_j: float


class RequestEnergy(BaseModel):
    """A request that is over, with its bill."""

    id: str
    task: str
    model: str
    key: str | None = Field(description="Label of the API key that asked; null without keys.")
    status: str = Field(description="`ok`, `refused`, `cancelled`, `timed_out` or `failed`.")
    finished_at: datetime
    usage: Usage
    timings: Timings
    energy: Energy
    parts: list[PartOfBill] = Field(description="Where the allocated energy of a settled bill went.")
    carbon: Assumptions


class LatestRequests(BaseModel):
    """Requests that are over, newest first."""

    requests: list[RequestEnergy]


class PerQuery(BaseModel):
    """Joules of an answered request; null where none has a known bill."""

    mean: float | None
    p50: float | None = Field(description="By nearest rank: the figure of a real request.")
    p95: float | None


class GroupEnergy(BaseModel):
    """Requests that have something in common; null is unknown, never zero."""

    name: str | None = Field(description="Task, model, key, hour or day (UTC); null for requests without a key.")
    requests: int
    answered: int = Field(description="Those with the status `ok`.")
    usage: Usage
    active_j: float | None = Field(description="Joules above idle, of all requests with a known bill.")
    allocated_j: float | None = Field(description="Joules with their share of idle.")
    gco2e: float | None = Field(description="Grams of CO2-equivalent of the allocated energy.")
    j_per_query: PerQuery
    j_per_output_token: float | None = Field(description="Of the requests that wrote tokens.")
    quality: dict[Quality, float] = Field(description="Share of the requests by the quality of their bill.")
    phases: dict[Phase, float] = Field(description="Allocated joules by phase, as far as readings cover them.")
    devices: dict[str, float] = Field(description="Allocated joules by device, likewise.")


class MeterBalance(BaseModel):
    """One device since the service started: attributed, unattributed, open and residual joules are what it counted."""

    device: str
    source: str
    metered_j: float
    attributed_j: float = Field(description="On the bills of requests that are over.")
    unattributed_j: dict[Reason, float] = Field(description="On no bill, and why.")
    open_j: float = Field(description="Not settled yet.")
    residual_j: float = Field(description="In no book: 0, or there is an error in them.")


class EnergyReport(BaseModel):
    """What the requests of a time cost. Written requests appear within a second."""

    since: datetime
    until: datetime
    by: By
    groups: list[GroupEnergy]
    total: GroupEnergy
    meters: list[MeterBalance] = Field(description="Of the machine, for those who may see every key's bills.")


class EnergyQuery(BaseModel):
    """Which requests, and what they are grouped by."""

    model_config = ConfigDict(extra="forbid")

    since: str = Field(
        "24h",
        description="Requests that ended from then on: an age in s, m, h, d or w, or an ISO 8601 time (UTC unless it "
        "says otherwise).",
        examples=["7d", "2026-11-24T10:00Z"],
    )
    until: str | None = Field(None, description="Requests that ended before then; now.", examples=["1h", "2026-11-25"])
    by: By = Field("task", description="What a group has in common.")


class LatestQuery(BaseModel):
    """How many requests."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=1000, description="How many, at most.")


EXAMPLE_GROUP: Mapping[str, Any] = {
    "name": "translate",
    "requests": 2,
    "answered": 2,
    "usage": {"input_tokens": 18, "output_tokens": 14},
    "active_j": 0.25,
    "allocated_j": 0.75,
    "gco2e": 0.0001,
    "j_per_query": {"mean": 0.375, "p50": 0.25, "p95": 0.5},
    "j_per_output_token": 0.05357,
    "quality": {"measured": 1.0, "apportioned": 0.0, "estimated": 0.0, "unavailable": 0.0},
    "phases": {"decode": 0.5, "prefill": 0.25},
    "devices": {"cpu": 0.65, "dram": 0.1},
}
EXAMPLE: Mapping[str, Any] = {
    "since": "2026-11-24T10:00:00Z",
    "until": "2026-11-24T11:00:00Z",
    "by": "task",
    "groups": [EXAMPLE_GROUP],
    "total": {**EXAMPLE_GROUP, "name": "total"},
    "meters": [
        {
            "device": "cpu",
            "source": "powercap",
            "metered_j": 21.65,
            "attributed_j": 0.65,
            "unattributed_j": {"idle": 20.0, "overhead": 0.5},
            "open_j": 0.5,
            "residual_j": 0.0,
        }
    ],
}


def energy_routes() -> APIRouter:
    """The account of requests and of the devices that they ran on."""
    router = APIRouter(prefix="/v1/energy", tags=["energy"])

    @router.get(
        "",
        operation_id="energy",
        summary="What the requests of a time cost, and the balance of the meters",
        response_model=EnergyReport,
        responses={
            200: {"content": {"application/json": {"example": EXAMPLE}}},
            **documented(InvalidValue, UnknownParameter, LedgerUnreadable),
        },
    )
    async def energy(query: Annotated[EnergyQuery, Query()], http: Request) -> Response:
        service = service_of(http)
        now_s = time.time()
        since_s = _moment("since", query.since, now_s)
        until_s = now_s if query.until is None else _moment("until", query.until, now_s)
        if since_s >= until_s:
            raise InvalidValue("since", "must be before until")
        only = caller().sees_only
        report = await asyncio.to_thread(read_report, service.ledger.path, since_s, until_s, query.by, only)
        totals = await asyncio.to_thread(service.account.totals) if only is None else None
        return JsonResponse(_show_report(report, totals).model_dump())

    @router.get(
        "/requests",
        operation_id="energy_of_latest_requests",
        summary="The bills of the latest requests, newest first",
        response_model=LatestRequests,
        responses=documented(InvalidValue, UnknownParameter, LedgerUnreadable),
    )
    async def latest(query: Annotated[LatestQuery, Query()], http: Request) -> Response:
        records = await asyncio.to_thread(service_of(http).ledger.latest, query.limit, caller().sees_only)
        return JsonResponse(LatestRequests(requests=[_show(record) for record in records]).model_dump())

    @router.get(
        "/requests/{request_id}",
        operation_id="energy_of_request",
        summary="The bill of a request that is over",
        response_model=RequestEnergy,
        responses=documented(RecordNotFound, LedgerUnreadable),
    )
    async def find(request_id: str, http: Request) -> Response:
        record = await asyncio.to_thread(service_of(http).account.find, request_id)
        only = caller().sees_only
        # Another key's is as if it were not there.
        if record is None or only not in (None, record.request.key):
            raise RecordNotFound("no request of this id is over, or the ledger has forgotten it")
        return JsonResponse(_show(record).model_dump())

    return router


def _show(record: SettledRecord) -> RequestEnergy:
    request, carbon = record.request, record.carbon
    return RequestEnergy(
        id=request.request_id,
        task=request.task,
        model=request.model,
        key=request.key,
        status=request.status,
        finished_at=datetime.fromtimestamp(record.time_s, UTC),
        usage=Usage(input_tokens=request.input_tokens, output_tokens=request.output_tokens),
        timings=Timings(queue_ms=request.queue_ms, compute_ms=request.compute_ms),
        energy=energy_of(record.bill),
        parts=[
            PartOfBill(device=part.device, phase=part.phase, allocated_j=part.energy_uj / UJ_PER_J)
            for part in record.bill.parts
        ],
        carbon=Assumptions(
            zone=carbon.zone,
            gco2e_per_kwh=carbon.gco2e_per_kwh,
            grid_source=carbon.grid_source,
            pue=carbon.pue,
            embodied_kg=carbon.embodied_kg,
            life_years=carbon.life_years,
            machine_share=carbon.machine_share,
        ),
    )


def _moment(param: str, text: str, now_s: float) -> float:
    try:
        return read_moment(text, now_s)
    except ValueError as error:
        raise InvalidValue(param, str(error)) from None


def _show_report(report: Report, totals: Totals | None) -> EnergyReport:
    return EnergyReport(
        since=datetime.fromtimestamp(report.since_s, UTC),
        until=datetime.fromtimestamp(report.until_s, UTC),
        by=report.by,
        groups=[_show_group(group) for group in report.groups],
        total=_show_group(report.total),
        meters=[] if totals is None else _show_meters(totals),
    )


def _show_meters(totals: Totals) -> list[MeterBalance]:
    return [
        MeterBalance(
            device=meter.device,
            source=meter.source,
            metered_j=(meter.settled_uj + meter.open_uj + meter.residual_uj) / UJ_PER_J,
            attributed_j=sum(part.energy_uj for part in totals.attributed if part.device == meter.device) / UJ_PER_J,
            unattributed_j={
                part.reason: part.energy_uj / UJ_PER_J for part in totals.unattributed if part.device == meter.device
            },
            open_j=meter.open_uj / UJ_PER_J,
            residual_j=meter.residual_uj / UJ_PER_J,
        )
        for meter in totals.meters
    ]


def _show_group(group: Group) -> GroupEnergy:
    return GroupEnergy(
        name=group.name,
        requests=group.requests,
        answered=group.answered,
        usage=Usage(input_tokens=group.input_tokens, output_tokens=group.output_tokens),
        active_j=joules(group.active_uj),
        allocated_j=joules(group.allocated_uj),
        gco2e=group.gco2e,
        j_per_query=PerQuery(
            mean=joules(group.query_mean_uj), p50=joules(group.query_p50_uj), p95=joules(group.query_p95_uj)
        ),
        j_per_output_token=joules(group.output_token_uj),
        quality=group.quality_shares,
        phases={phase: energy_uj / UJ_PER_J for phase, energy_uj in group.phases.items()},
        devices={device: energy_uj / UJ_PER_J for device, energy_uj in group.devices.items()},
    )
