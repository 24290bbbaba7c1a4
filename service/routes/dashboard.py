"""The dashboard: one page, its script and its style, and the figures that it shows."""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from energy.budget import Standing
from energy.live import BOUNDS_UJ, View
from energy.types import Quality, SettledRecord
from service.caller import caller
from service.errors import documented
from service.metrics import UJ_PER_J
from service.responses import JsonResponse
from service.routes.common import Energy, Usage, energy_of, service_of

_FOLDER = Path(__file__).parent.parent / "dashboard"
_MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    # The page loads nothing from elsewhere and runs nothing inline, so that a text can never become a script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


class LiveMeter(BaseModel):
    """Where joules are read."""

    device: str
    source: str


class LiveMoment(BaseModel):
    """The account's counters at one time, in joules since the service started; their differences are power."""

    at: datetime
    metered_j: float = Field(description="What the meters counted.")
    tasks: dict[str, float] = Field(description="Booked on requests that were over, by task.")
    unattributed: dict[str, float] = Field(description="Booked on no request, by reason, ten seconds late.")


class LiveTask(BaseModel):
    """What the requests of one task that the caller may see have cost since the service started."""

    requests: int
    unknown: int = Field(description="Those whose bill is unavailable; the sums leave them out.")
    allocated_j: float
    gco2e: float
    counts: list[int] = Field(description="Requests by class of `allocated_j`, one class more than `bounds_j`.")


class LiveBill(BaseModel):
    """A request that is over."""

    id: str
    task: str
    model: str
    status: str
    finished_at: datetime
    usage: Usage
    energy: Energy


class LiveBudget(BaseModel):
    """Today's joules."""

    limit_j: float
    spent_j: float
    resets_in_s: float


class Live(BaseModel):
    """The last minutes of this process."""

    began_at: datetime
    quality: Quality = Field(description="The best that a bill can have here.")
    meters: list[LiveMeter]
    grid_zone: str | None = Field(description="Of the latest bill.")
    budget: LiveBudget | None = Field(description="The daily budget of the caller's key, else the service's.")
    moments: list[LiveMoment] | None = Field(
        description="Every five seconds of the last ten minutes, oldest first. They are of all keys together: null "
        "for one that sees its own bills alone."
    )
    bounds_j: list[float] = Field(description="Upper ends of the classes of the distribution.")
    tasks: dict[str, LiveTask]
    recent: list[LiveBill] = Field(description="Of the last fifty bills those that the caller may see, newest first.")


def dashboard_routes() -> APIRouter:
    """The page, and what it polls."""
    router = APIRouter()

    @router.get(
        "/v1/energy/live",
        tags=["energy"],
        operation_id="live_energy",
        summary="The last minutes, as the dashboard shows them",
        response_model=Live,
        responses=documented(),
    )
    async def live(http: Request) -> Response:
        service = service_of(http)
        key, books = caller().key, service.books
        standing = (None if key is None else books.today_of(key)) or books.today()
        only = caller().sees_only
        shown = _show(books.live.view(only), service.account.quality, standing, sees_all=only is None)
        return JsonResponse(shown.model_dump())

    router.add_api_route("/dashboard", _page(_FOLDER / "index.html"), include_in_schema=False)
    for path in (*_FOLDER.glob("*.js"), *_FOLDER.glob("*.css")):
        router.add_api_route(f"/dashboard/{path.name}", _page(path), include_in_schema=False)
    return router


def _page(path: Path) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(path.read_bytes(), media_type=_MEDIA_TYPES[path.suffix], headers=_HEADERS)

    return page


def _show(view: View, quality: Quality, standing: Standing | None, *, sees_all: bool) -> Live:
    return Live(
        began_at=_time(view.began_s),
        quality=quality,
        meters=[LiveMeter(device=meter.device, source=meter.source) for meter in view.meters],
        grid_zone=view.recent[0].carbon.zone if view.recent else None,
        budget=None
        if standing is None
        else LiveBudget(
            limit_j=standing.limit_uj / UJ_PER_J,
            spent_j=standing.spent_uj / UJ_PER_J,
            resets_in_s=standing.resets_in_s,
        ),
        moments=[
            LiveMoment(
                at=_time(moment.time_s),
                metered_j=moment.metered_uj / UJ_PER_J,
                tasks=_in_joules(moment.by_task_uj),
                unattributed=_in_joules(moment.unattributed_uj),
            )
            for moment in view.moments
        ]
        if sees_all
        else None,
        bounds_j=[bound_uj / UJ_PER_J for bound_uj in BOUNDS_UJ],
        tasks={
            task: LiveTask(
                requests=sums.requests,
                unknown=sums.unknown,
                allocated_j=sums.allocated_uj / UJ_PER_J,
                gco2e=sums.gco2e,
                counts=sums.counts,
            )
            for task, sums in view.tasks.items()
        },
        recent=list(map(_bill, view.recent)),
    )


def _bill(record: SettledRecord) -> LiveBill:
    request = record.request
    return LiveBill(
        id=request.request_id,
        task=request.task,
        model=request.model,
        status=request.status,
        finished_at=_time(record.time_s),
        usage=Usage(input_tokens=request.input_tokens, output_tokens=request.output_tokens),
        energy=energy_of(record.bill),
    )


def _in_joules(parts: Mapping[str, int]) -> dict[str, float]:
    return {name: energy_uj / UJ_PER_J for name, energy_uj in parts.items()}


def _time(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)
