"""LibreTranslate's dialect, in JSON and in forms: translations, and the languages that there are."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from service.caller import caller
from service.conversation import request_of
from service.core import Receipt
from service.engine.types import Overloaded
from service.errors import (
    BodyTooLarge,
    InvalidValue,
    MalformedBody,
    MissingParameter,
    TooManyAtOnce,
    documented,
    invalid_value,
    renaming,
)
from service.languages import Detection, detect, name_of
from service.models import Models
from service.responses import JsonResponse
from service.routes.common import Energy, energy_of, service_of
from service.routes.openai.common import ERRORS
from service.routes.sse import respond_whole
from service.tasks import TASKS

_NAMES = {"input": "q"}
_MAX_FIELDS = 64
"""Of a form: more than anybody has a use for."""
_SURE = 0.5
"""Probability above which a text is in the target language: of a word or two nobody knows, and they are translated."""
TRANSLATE = next(task for task in TASKS if task.name == "translate")
BodyT = TypeVar("BodyT", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    api_key: str | None = Field(None, description="The API key, where no header brings it.")


class LibreTranslation(_Body):
    """Texts to translate."""

    q: str | list[str] = Field(description="A text or, in JSON, a list of them.")
    source: str = Field(min_length=1, description="Language code of the input; `auto` detects it.")
    target: str = Field(min_length=1, description="Language code of the output.")
    format: str | None = Field(None, description="Nothing but `text` can be had.")
    alternatives: int | str | None = Field(None, description="There are none: where asked for, the list is empty.")
    # A form brings it as text.
    energy_budget_j: float | None = Field(None, strict=False, description="Most joules that the translation may cost.")


class LibreDetection(_Body):
    """A text whose language is asked for."""

    q: str = Field(min_length=1)


class DetectedLanguage(BaseModel):
    """The likeliest of the languages that are translated."""

    confidence: float = Field(description="Percent, among all languages.")
    language: str


class LibreTranslated(BaseModel):
    """The translation: texts where a list came, else a text."""

    translatedText: str | list[str]
    detectedLanguage: DetectedLanguage | list[DetectedLanguage] | None = Field(
        None, exclude_if=lambda detected: detected is None, description="Where `source` was `auto`."
    )
    alternatives: list[str] | None = Field(None, exclude_if=lambda alternatives: alternatives is None)
    energy: Energy | None = Field(description="Null where the text is in the target language, and stays as it is.")


class LibreLanguage(BaseModel):
    """A language, and those that it is translated to."""

    code: str
    name: str
    targets: list[str]


def libretranslate_routes() -> APIRouter:
    """What clients of LibreTranslate call."""
    router = APIRouter(tags=["libretranslate"])

    @router.post(
        "/translate",
        operation_id="libretranslate",
        summary="LibreTranslate: translate texts",
        response_model=LibreTranslated,
        responses=ERRORS,
        openapi_extra=_body(LibreTranslation, {"q": "A dog runs along the beach.", "source": "auto", "target": "de"}),
    )
    async def translate(http: Request) -> Response:
        body = await _read(http, LibreTranslation)
        if body.format not in (None, "text"):
            raise InvalidValue("format", f"{body.format!r} is not supported: send plain text")
        detected = None
        if body.source == "auto":
            text = body.q if isinstance(body.q, str) else "\n".join(body.q)
            detected = await _detect(http, text, body.target)
        source = detected.language if detected else body.source
        if source == body.target and source in _codes(service_of(http).models):
            return JsonResponse(_answer(body, _texts(body), detected, None))
        with renaming(_NAMES):
            # What is empty stays so: a list of subtitles has gaps.
            spoken = [text for text in body.q if text.strip()] if isinstance(body.q, list) else body.q
            asked = {"input": spoken or body.q, "source": source, "target": body.target}
            request = request_of(TRANSLATE, {**asked, "energy_budget_j": body.energy_budget_j})

        def tell(receipt: Receipt) -> dict[str, Any]:
            written = iter([getattr(result, TRANSLATE.says) for result in receipt.results])
            texts = [next(written) if text.strip() else "" for text in _texts(body)]
            return _answer(body, texts, detected, energy_of(receipt.bill))

        return await respond_whole(http, TRANSLATE, request, tell, _NAMES)

    @router.post(
        "/detect",
        operation_id="libretranslate_detect",
        summary="LibreTranslate: which of the languages that are translated is a text in?",
        response_model=list[DetectedLanguage],
        responses=documented(MalformedBody, InvalidValue, MissingParameter, BodyTooLarge, TooManyAtOnce, Overloaded),
        openapi_extra=_body(LibreDetection, {"q": "A dog runs along the beach."}),
    )
    async def detect_language(http: Request) -> Response:
        body = await _read(http, LibreDetection)
        return JsonResponse([_shown(await _detect(http, body.q)).model_dump()])

    @router.get(
        "/languages",
        operation_id="libretranslate_languages",
        summary="LibreTranslate: the languages that are translated",
        response_model=list[LibreLanguage],
        responses=documented(),
    )
    async def languages(http: Request) -> Response:
        found = await asyncio.to_thread(_languages, service_of(http).models)
        return JsonResponse([each.model_dump() for each in found])

    @router.get(
        "/frontend/settings",
        operation_id="libretranslate_settings",
        summary="LibreTranslate: what a user interface may offer",
        responses=documented(),
    )
    async def settings(http: Request) -> Response:
        found = await asyncio.to_thread(_languages, service_of(http).models)
        first = next((each for each in found if each.targets), None)
        guarded = http.app.state.gate.guards
        default = None
        if first is not None:
            target = next(each for each in found if each.code == first.targets[0])
            default = {"source": _named(first), "target": _named(target)}
        return JsonResponse(
            {
                "charLimit": -1,
                "frontendTimeout": 500,
                "apiKeys": guarded,
                "keyRequired": guarded,
                "suggestions": False,
                "supportedFilesFormat": [],
                "language": default,
            }
        )

    return router


async def _read(http: Request, kind: type[BodyT]) -> BodyT:
    """The body, JSON or a form. Raises ``MalformedBody`` and ``InvalidValue``."""
    content, kind_of_body = await http.body(), http.headers.get("content-type", "")
    if kind_of_body.startswith("multipart/"):
        raise MalformedBody("a form must come as application/x-www-form-urlencoded")
    try:
        if kind_of_body.startswith("application/json"):
            told = json.loads(content)
        else:
            told = dict(parse_qsl(content.decode(), strict_parsing=True, max_num_fields=_MAX_FIELDS))
    except (ValueError, RecursionError) as error:
        raise MalformedBody(f"the body is neither JSON nor a form: {error}") from error
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise InvalidValue(None, "the body must be a JSON object") from error
        raise invalid_value(first["type"], str(first["loc"][0]), first["msg"]) from error


def _texts(body: LibreTranslation) -> list[str]:
    return body.q if isinstance(body.q, list) else [body.q]


def _answer(
    body: LibreTranslation, texts: list[str], detected: Detection | None, energy: Energy | None
) -> dict[str, Any]:
    several = isinstance(body.q, list)
    shown = _shown(detected) if detected else None
    return LibreTranslated(
        translatedText=texts if several else texts[0],
        detectedLanguage=[shown] * len(texts) if several and shown else shown,
        alternatives=None if body.alternatives in (None, 0, "0") else [],
        energy=energy,
    ).model_dump()


async def _detect(http: Request, text: str, target: str | None = None) -> Detection:
    """The language of ``text``: of those that are translated, into ``target`` if any is, or surely ``target`` itself.

    Raises ``InvalidValue``, and what the door raises: reading a long text is work.
    """
    models = service_of(http).models
    among = {source for source, goal in _pairs(models) if goal == target} or _codes(models)
    who = caller()
    with service_of(http).door.admit(1, who.tokens, who.key):
        detected = await asyncio.to_thread(detect, text, among | {code for code in _codes(models) if code == target})
        if detected is not None and detected.language == target and detected.probability < _SURE:
            detected = await asyncio.to_thread(detect, text, among)
    if detected is None:
        raise InvalidValue("q", "its language cannot be detected here")
    return detected


def _pairs(models: Models) -> list[tuple[str, str]]:
    """What is translated into what."""
    languages = (model.manifest.languages for model in models.for_task("translate"))
    return [(source, target) for source, target in languages]


def _codes(models: Models) -> set[str]:
    """The languages that are translated, from or into."""
    return {code for pair in _pairs(models) for code in pair}


def _languages(models: Models) -> list[LibreLanguage]:
    pairs = _pairs(models)
    codes = dict.fromkeys(code for pair in pairs for code in pair)
    return [
        LibreLanguage(
            code=code,
            name=name_of(code),
            targets=list(dict.fromkeys(target for source, target in pairs if source == code)),
        )
        for code in codes
    ]


def _shown(detected: Detection) -> DetectedLanguage:
    return DetectedLanguage(confidence=round(100 * detected.probability, 1), language=detected.language)


def _named(language: LibreLanguage) -> dict[str, str]:
    return {"code": language.code, "name": language.name}


def _body(kind: type[BaseModel], example: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body for the OpenAPI document, which comes as JSON or as a form."""
    schema = kind.model_json_schema()
    content = {
        "application/json": {"schema": schema, "example": example},
        "application/x-www-form-urlencoded": {"schema": schema},
    }
    return {"requestBody": {"required": True, "content": content}}
