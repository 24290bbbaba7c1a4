"""Classifiers over HTTP: make them of examples, ask them, look at them, delete them."""

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.classifiers.store import Classifier, Classifiers
from service.errors import ClassifierNotFound, ClassifierUnavailable, documented
from service.responses import JsonResponse
from service.routes.common import CLASSIFIER_ERRORS, TASK_ERRORS, service_of
from service.routes.knowledge import Deleted
from service.routes.lean import JsonRoute
from service.routes.sse import respond_whole
from service.routes.tasks import Native, TaskResponse
from service.tasks.classify import Classify, ClassifyRequest, ClassifyResult, Made, Make, MakeRequest, made


class ClassifierLine(Made):
    """A classifier in figures."""

    model: str = Field(description="Whose vectors it reads.")
    revision: str = Field(description="Of that model, when the classifier was made.")
    current: bool = Field(
        description="Whether that model is loaded as it was then. One that has changed costs the next request to "
        "`/v1/classify` the making anew; one that is gone is `classifier_model_gone`."
    )
    created_at: datetime


class Example(BaseModel):
    """What a classifier was made of."""

    text: str
    label: str


class WholeClassifier(ClassifierLine):
    """A classifier with its examples."""

    examples: list[Example]


class ClassifierList(BaseModel):
    """All of them, by name."""

    classifiers: list[ClassifierLine]


def classifier_routes() -> APIRouter:
    """The classifiers, and the task that asks them."""
    router = APIRouter(prefix="/v1", tags=["classifiers"], route_class=JsonRoute)
    name_errors = documented(ClassifierNotFound, ClassifierUnavailable)

    @router.post(
        "/classify",
        operation_id=Classify.name,
        summary=Classify.summary,
        response_model=TaskResponse[ClassifyResult],
        responses=documented(*TASK_ERRORS, *CLASSIFIER_ERRORS),
        openapi_extra={"requestBody": {"content": {"application/json": {"example": Classify.example}}}},
    )
    async def classify(body: ClassifyRequest, http: Request) -> Response:
        return await respond_whole(http, Classify(_classifiers(http)), body, Native().whole, {})

    @router.post(
        "/classifiers",
        operation_id=Make.name,
        summary=Make.summary,
        response_model=TaskResponse[Made],
        responses=documented(*TASK_ERRORS, ClassifierUnavailable),
        openapi_extra={"requestBody": {"content": {"application/json": {"example": Make.example}}}},
    )
    async def make(body: MakeRequest, http: Request) -> Response:
        return await respond_whole(http, Make(_classifiers(http)), body, Native().whole, {})

    @router.get(
        "/classifiers",
        operation_id="classifiers",
        summary="List the classifiers",
        response_model=ClassifierList,
        responses=documented(),
    )
    async def list_all(http: Request) -> Response:
        found = await asyncio.to_thread(_classifiers(http).find_all)
        lines = [ClassifierLine(**_figures(http, each)) for each in found]
        return JsonResponse(ClassifierList(classifiers=lines).model_dump())

    @router.get(
        "/classifiers/{name}",
        operation_id="classifier",
        summary="Describe a classifier, with its examples",
        response_model=WholeClassifier,
        responses=name_errors,
    )
    async def describe(name: str, http: Request) -> Response:
        found = await asyncio.to_thread(_classifiers(http).find, name)
        examples = [Example(text=each.text, label=each.label) for each in found.examples]
        return JsonResponse(WholeClassifier(**_figures(http, found), examples=examples).model_dump())

    @router.delete(
        "/classifiers/{name}",
        operation_id="delete_classifier",
        summary="Delete a classifier with its examples",
        response_model=Deleted,
        responses=name_errors,
    )
    async def delete(name: str, http: Request) -> Response:
        await asyncio.to_thread(_classifiers(http).delete, name)
        return JsonResponse(Deleted(deleted=name).model_dump())

    return router


def _classifiers(http: Request) -> Classifiers:
    return service_of(http).classifiers


def _figures(http: Request, classifier: Classifier) -> dict[str, Any]:
    model = service_of(http).models.served.get(classifier.model)
    return {
        **made(classifier).model_dump(),
        "model": classifier.model,
        "revision": classifier.revision,
        "current": model is not None and model.fingerprint == classifier.fingerprint,
        "created_at": datetime.fromtimestamp(classifier.created_s, UTC),
    }
