"""For whoever runs the service: is it alive, is it ready, how is it doing?"""

import asyncio
from typing import Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from service.docs import docs_page
from service.errors import documented
from service.responses import JsonResponse
from service.routes.common import service_of
from service.tasks import TASKS


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class ReadyModel(BaseModel):
    """A model that is served."""

    name: str
    revision: str
    tasks: list[str]
    bits: int = Field(description="Of a stored weight; below 32 the model is quantised.")


class RefusedModel(BaseModel):
    """A folder that is not served."""

    folder: str
    reason: str


class Readiness(BaseModel):
    """Whether requests can be answered, and which."""

    status: Literal["ready", "not ready"]
    tasks: dict[str, str | None] = Field(description="The default model of each task; null where there is none.")
    models: list[ReadyModel]
    refused: list[RefusedModel] = Field(description="Model folders that are damaged or that no task can use.")
    ledger: str | None = Field(description="Why bills cannot be written to disk just now; null where they can.")


def operations_routes() -> APIRouter:
    """Probes, metrics and docs."""
    router = APIRouter(tags=["operations"])

    @router.get(
        "/livez",
        operation_id="livez",
        summary="Is the process alive?",
        response_model=Alive,
        responses=documented(),
    )
    async def livez() -> Response:
        return JsonResponse(Alive().model_dump())

    @router.get(
        "/readyz",
        operation_id="readyz",
        summary="Can requests be answered, and by which models?",
        response_model=Readiness,
        responses={503: {"model": Readiness, "description": "No model is served."}, **documented()},
    )
    async def readyz(http: Request) -> Response:
        models = service_of(http).models
        defaults: dict[str, str | None] = {
            task.name: next((m.name for m in models.for_task(task.name)), None) for task in TASKS
        }
        readiness = Readiness(
            status="ready" if models.served else "not ready",
            tasks=defaults,
            models=[
                ReadyModel(
                    name=model.name,
                    revision=model.manifest.revision,
                    tasks=list(model.manifest.tasks),
                    bits=model.manifest.quantisation.bits,
                )
                for model in models.served.values()
            ],
            refused=[RefusedModel(folder=refusal.folder_name, reason=refusal.reason) for refusal in models.refused],
            ledger=service_of(http).ledger.failure,
        )
        return JsonResponse(readiness.model_dump(), 200 if models.served else 503)

    @router.get(
        "/metrics",
        operation_id="metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **documented()},
    )
    async def metrics(http: Request) -> Response:
        exposition = await asyncio.to_thread(service_of(http).metrics.exposition)
        return Response(exposition, media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @router.get("/docs", include_in_schema=False)
    async def docs(http: Request) -> Response:
        return HTMLResponse(docs_page(http.app.openapi(), str(http.base_url).rstrip("/")))

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    return router
