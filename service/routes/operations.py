"""For whoever runs the service: is it alive, is it ready, how is it doing?"""

import asyncio
from ipaddress import ip_address
from typing import Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from service.caller import caller
from service.docs import docs_page
from service.engine.types import EngineClosed, EngineFailed
from service.errors import (
    AdminOnly,
    BodyTooLarge,
    InvalidValue,
    MalformedBody,
    MissingParameter,
    ModelInUse,
    ModelNotFound,
    ModelRefused,
    UnknownParameter,
    documented,
)
from service.models import Model
from service.repository import Repository, State
from service.responses import JsonResponse
from service.routes.common import service_of
from service.tasks import TASKS

_OF_A_BODY = (MalformedBody, BodyTooLarge, InvalidValue, MissingParameter, UnknownParameter)
_PROXIES = ("forwarded", "x-forwarded-for", "x-real-ip")
"""Headers by which a proxy tells that the caller is another."""


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"] = "alive"


class ReadyModel(BaseModel):
    """A model that is served."""

    name: str
    revision: str
    tasks: list[str]
    bits: int = Field(description="Of a stored weight; below 32 the model is quantised.")
    state: State = Field(description="Where it is; the first request loads one that is on disk.")
    memory_mb: float = Field(description="Most that it takes in memory, weights and buffers.")


class WhichModel(BaseModel):
    """A model to load or unload."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(
        min_length=1,
        description="Its name, or the name of its folder within the folders of models that the service was given.",
    )


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
    engine: str | None = Field(description="Why nothing is computed any more; null where it is.")


def require_admin(http: Request) -> None:
    """Raise ``AdminOnly`` for a caller who may not change what is served: one from elsewhere, or through a proxy.

    Where there are keys, the gate has seen that it is an administrator's.
    """
    if caller().key is not None:
        return
    try:
        near = http.client is not None and ip_address(http.client.host).is_loopback
    except ValueError:
        near = False
    if not near or any(name in http.headers for name in _PROXIES):
        raise AdminOnly


def _shown(repository: Repository, model: Model) -> ReadyModel:
    return ReadyModel(
        name=model.name,
        revision=model.manifest.revision,
        tasks=list(model.manifest.tasks),
        bits=model.manifest.quantisation.bits,
        state=repository.state(model),
        memory_mb=repository.memory_of(model) / 1e6,
    )


def operations_routes() -> APIRouter:
    """Probes, models, metrics and docs."""
    router = APIRouter(tags=["operations"])

    @router.get(
        "/livez",
        operation_id="livez",
        summary="Is the process alive, and does it still compute?",
        response_model=Alive,
        responses=documented(EngineFailed),
    )
    async def livez(http: Request) -> Response:
        if (lost := service_of(http).engine.lost) is not None:
            raise lost
        return JsonResponse(Alive().model_dump())

    @router.get(
        "/readyz",
        operation_id="readyz",
        summary="Can requests be answered, and by which models?",
        response_model=Readiness,
        responses={
            503: {"model": Readiness, "description": "No model is served, or nothing is computed any more."},
            **documented(),
        },
    )
    async def readyz(http: Request) -> Response:
        service = service_of(http)
        repository, lost = service.repository, service.engine.lost
        models = repository.models
        defaults: dict[str, str | None] = {
            task.name: next((m.name for m in models.for_task(task.name)), None) for task in TASKS
        }
        is_ready = bool(models.served) and lost is None
        readiness = Readiness(
            status="ready" if is_ready else "not ready",
            tasks=defaults,
            models=[_shown(repository, model) for model in models.served.values()],
            refused=[RefusedModel(folder=refusal.folder_name, reason=refusal.reason) for refusal in models.refused],
            ledger=service.ledger.failure,
            engine=None if lost is None else str(lost),
        )
        return JsonResponse(readiness.model_dump(), 200 if is_ready else 503)

    @router.get(
        "/readyz/{model}",
        operation_id="readyz_model",
        summary="Is a model in memory?",
        response_model=ReadyModel,
        responses={503: {"model": ReadyModel, "description": "It is on disk."}, **documented(ModelNotFound)},
    )
    async def readyz_model(model: str, http: Request) -> Response:
        repository = service_of(http).repository
        shown = _shown(repository, repository.models.named(model))
        return JsonResponse(shown.model_dump(), 200 if shown.state == "loaded" else 503)

    @router.post(
        "/v1/models/load",
        operation_id="load_model",
        summary="Load a model from disk, or a new revision in the place of the one that is served",
        response_model=ReadyModel,
        responses=documented(*_OF_A_BODY, AdminOnly, ModelNotFound, ModelInUse, ModelRefused, EngineClosed),
    )
    async def load_model(which: WhichModel, http: Request) -> Response:
        require_admin(http)
        repository = service_of(http).repository
        return JsonResponse(_shown(repository, await repository.load(which.model)).model_dump())

    @router.post(
        "/v1/models/unload",
        operation_id="unload_model",
        summary="Serve a model no more; answered when its running requests are over",
        response_model=ReadyModel,
        responses=documented(*_OF_A_BODY, AdminOnly, ModelNotFound, ModelInUse),
    )
    async def unload_model(which: WhichModel, http: Request) -> Response:
        require_admin(http)
        repository = service_of(http).repository
        return JsonResponse(_shown(repository, await repository.unload(which.model)).model_dump())

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
        page, policy = docs_page(http.app.openapi(), str(http.base_url).rstrip("/"))
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @router.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("docs")

    return router
