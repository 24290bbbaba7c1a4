"""The models that are served, as OpenAI's clients list them."""

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.errors import ModelNotFound, documented
from service.models import Models
from service.responses import JsonResponse
from service.routes.common import service_of


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this service began to serve it.")
    owned_by: Literal["wattle"] = "wattle"
    root: str = Field(description="Its own name, where `id` is an alias.")
    tasks: list[str]
    languages: list[str]


class ModelList(BaseModel):
    """All models under all of their names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def add_models(router: APIRouter) -> None:
    """Add the routes."""
    since = int(time.time())

    def card(models: Models, name: str) -> ModelCard:
        manifest = models.named(name).manifest
        return ModelCard(
            id=name,
            created=since,
            root=manifest.name,
            tasks=list(manifest.tasks),
            languages=list(manifest.languages),
        )

    @router.get(
        "/models",
        operation_id="models",
        summary="OpenAI: the models that are served",
        response_model=ModelList,
        responses=documented(),
    )
    async def list_models(http: Request) -> Response:
        models = service_of(http).models
        cards = [card(models, name) for name in (*models.served, *models.aliases)]
        return JsonResponse(ModelList(data=cards).model_dump())

    @router.get(
        "/models/{model:path}",
        operation_id="model",
        summary="OpenAI: a model that is served",
        response_model=ModelCard,
        responses=documented(ModelNotFound),
    )
    async def show_model(model: str, http: Request) -> Response:
        return JsonResponse(card(service_of(http).models, model).model_dump())
