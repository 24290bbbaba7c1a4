"""What can go wrong for a caller: one tree of errors, one table of answers, rendered once.

Errors are raised anywhere; only this module knows the HTTP status that each becomes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from energy.ledger import LedgerUnreadable
from service.engine.types import EngineClosed, EngineFailed, Overloaded
from service.responses import JsonResponse

EMPTY_BODY = "the body is empty; it must be a JSON object"
UNREADABLE_BODY = "the body cannot be read as JSON"
_SCHEMAS = "#/components/schemas/"


class WattleError(Exception):
    """An answer other than the one asked for; the message is written for the caller."""

    param: str | None = None


class MalformedBody(WattleError):
    """The body is not what its content-type says."""


class HeadersTooLarge(WattleError):
    """Headers and address are over the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the headers and the address are larger than the {limit} bytes allowed")


class Unauthenticated(WattleError):
    """The request brings no key, or one that nobody has."""

    def __init__(self, *, given: bool) -> None:
        where = "send it as `authorization: Bearer KEY` or `x-api-key: KEY`"
        super().__init__("the API key is not known here" if given else f"an API key is needed: {where}")


class RouteNotFound(WattleError):
    """No such path."""


class MethodNotAllowed(WattleError):
    """The path exists, the method doesn't."""


class ModelNotFound(WattleError):
    """No loaded model of that name serves the task, or none at all."""

    param = "model"

    def __init__(self, name: str | None, known: Sequence[str], task: str | None = None) -> None:
        missing = "no model is loaded" if name is None else f"the model {name!r} is not loaded"
        purpose = f" for the task {task}" if task else ""
        super().__init__(f"{missing}{purpose}; loaded are: {', '.join(known) or 'none'}")


class ModelRefused(WattleError):
    """A model folder is damaged, or holds what is not served."""

    param = "model"

    def __init__(self, folder_name: str, reason: str) -> None:
        super().__init__(f"the model folder {folder_name} is refused: {reason}")


class ModelInUse(WattleError):
    """The knowledge bases are indexed with the model."""

    param = "model"

    def __init__(self, name: str) -> None:
        super().__init__(f"knowledge bases search with {name}: restart the service to change or remove it")


class ModelUnavailable(WattleError):
    """A model that is served from disk cannot be loaded."""

    param = "model"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the model {name} cannot be loaded: {reason}")


class AdminOnly(WattleError):
    """Only whoever runs the service may do this."""

    def __init__(self) -> None:
        super().__init__(
            "only an administrator's key may load and unload models, or where there are no keys a client on the "
            "service's own machine"
        )


class RecordNotFound(WattleError):
    """The ledger has no request of that id."""


class KnowledgeBaseNotFound(WattleError):
    """There is no knowledge base of that name."""

    param = "knowledge_base"

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no knowledge base {name!r}; GET /v1/knowledge lists those there are")


class DocumentNotFound(WattleError):
    """The knowledge base has no document of that id."""

    def __init__(self, document_id: str) -> None:
        super().__init__(f"the knowledge base has no document {document_id!r}")


class KnowledgeUnavailable(WattleError):
    """The file of a knowledge base cannot be read or written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the knowledge base cannot be used: {reason}")


class ClassifierNotFound(WattleError):
    """There is no classifier of that name."""

    param = "classifier"

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no classifier {name!r}; GET /v1/classifiers lists those there are")


class ClassifierModelGone(WattleError):
    """The model on whose vectors a classifier was made is not loaded."""

    param = "classifier"

    def __init__(self, name: str, model: str) -> None:
        super().__init__(
            f"the classifier {name!r} was made on the model {model!r}, which is not loaded or gives no vectors; "
            f"POST its examples (GET /v1/classifiers/{name}) to /v1/classifiers to make it anew"
        )


class ClassifierUnavailable(WattleError):
    """The file of a classifier cannot be read or written."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the classifier {name!r} cannot be used: {reason}")


class BodyTooLarge(WattleError):
    """The body is over the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than the {limit} bytes allowed")


class InvalidValue(WattleError):
    """A parameter has the wrong type or an impossible value."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param

    def __str__(self) -> str:
        # The parameter may still be renamed: a dialect has its own name for it.
        return f"{self.param}: {self.args[0]}" if self.param else str(self.args[0])


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Inside it, parameters are blamed by the ``names`` that a dialect has for them."""
    try:
        yield
    except InvalidValue as error:
        error.param = names.get(error.param or "", error.param)
        raise


class MissingParameter(InvalidValue):
    """A parameter without a default is absent."""


class UnknownParameter(InvalidValue):
    """A parameter that the task doesn't have."""


class UnsupportedLanguages(InvalidValue):
    """No loaded model translates between these languages."""


class TooManyTokens(InvalidValue):
    """A text is longer than the model reads."""

    def __init__(self, param: str, tokens: int, allowed: int) -> None:
        hint = '"truncate": true cuts it to fit'
        super().__init__(param, f"the text has {tokens} tokens; at most {allowed} are allowed ({hint})")


class EnergyBudgetExceeded(InvalidValue):
    """A request would cost more than it may; nothing of it has run."""

    def __init__(self, budget_j: float, expected_j: float, interval_j: tuple[float, float] | None) -> None:
        usual = f", usually {interval_j[0]:.3g} to {interval_j[1]:.3g} J" if interval_j else ""
        super().__init__(
            "energy_budget_j",
            f"the request is expected to cost {expected_j:.3g} J{usual}; {budget_j:.3g} J are allowed. Shorten its "
            "texts or its max_tokens, or allow more",
        )


class DailyBudgetSpent(WattleError):
    """Today's joules are spent; ``retry_after_s`` is until tomorrow."""

    def __init__(self, limit_j: float, retry_after_s: float, key: str | None = None) -> None:
        whose = "" if key is None else f" the key {key}"
        super().__init__(f"the {limit_j:g} J allowed{whose} for today are spent; the next day begins at midnight UTC")
        self.retry_after_s = retry_after_s


class RateExceeded(WattleError):
    """A key has asked for more than its minute holds."""

    def __init__(self, of: str, per_minute: int, retry_after_s: float) -> None:
        super().__init__(f"the key may use {per_minute} {of} a minute; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class TooManyAtOnce(WattleError):
    """A key has as many texts inside as it may."""

    def __init__(self, limit: int, retry_after_s: float) -> None:
        super().__init__(f"the key may have {limit} texts at once; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class NotReady(WattleError):
    """The service is starting or shutting down."""


class DeadlineExceeded(WattleError):
    """The request took longer than it may."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the request took longer than the {limit_s:g} s allowed")


@dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of error is shown to a caller."""

    status: int
    type: str
    code: str


TABLE: dict[type[Exception], Answer] = {
    MalformedBody: Answer(400, "invalid_request_error", "malformed_body"),
    Unauthenticated: Answer(401, "authentication_error", "invalid_api_key"),
    RouteNotFound: Answer(404, "invalid_request_error", "route_not_found"),
    ModelNotFound: Answer(404, "invalid_request_error", "model_not_found"),
    RecordNotFound: Answer(404, "invalid_request_error", "request_not_found"),
    KnowledgeBaseNotFound: Answer(404, "invalid_request_error", "knowledge_base_not_found"),
    DocumentNotFound: Answer(404, "invalid_request_error", "document_not_found"),
    AdminOnly: Answer(403, "permission_error", "admin_only"),
    ModelInUse: Answer(409, "invalid_request_error", "model_in_use"),
    ModelRefused: Answer(422, "invalid_request_error", "model_refused"),
    ClassifierNotFound: Answer(404, "invalid_request_error", "classifier_not_found"),
    MethodNotAllowed: Answer(405, "invalid_request_error", "method_not_allowed"),
    ClassifierModelGone: Answer(409, "invalid_request_error", "classifier_model_gone"),
    BodyTooLarge: Answer(413, "invalid_request_error", "body_too_large"),
    InvalidValue: Answer(422, "invalid_request_error", "invalid_value"),
    MissingParameter: Answer(422, "invalid_request_error", "missing_parameter"),
    UnknownParameter: Answer(422, "invalid_request_error", "unknown_parameter"),
    UnsupportedLanguages: Answer(422, "invalid_request_error", "unsupported_languages"),
    TooManyTokens: Answer(422, "invalid_request_error", "too_many_tokens"),
    EnergyBudgetExceeded: Answer(422, "invalid_request_error", "energy_budget_exceeded"),
    DailyBudgetSpent: Answer(429, "rate_limit_error", "daily_budget_spent"),
    RateExceeded: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    TooManyAtOnce: Answer(429, "rate_limit_error", "too_many_at_once"),
    Overloaded: Answer(429, "rate_limit_error", "overloaded"),
    HeadersTooLarge: Answer(431, "invalid_request_error", "headers_too_large"),
    NotReady: Answer(503, "server_error", "not_ready"),
    ModelUnavailable: Answer(503, "server_error", "model_unavailable"),
    KnowledgeUnavailable: Answer(503, "server_error", "knowledge_unavailable"),
    ClassifierUnavailable: Answer(503, "server_error", "classifier_unavailable"),
    EngineClosed: Answer(503, "server_error", "draining"),
    EngineFailed: Answer(503, "server_error", "engine_failed"),
    LedgerUnreadable: Answer(503, "server_error", "ledger_unreadable"),
    DeadlineExceeded: Answer(504, "server_error", "deadline_exceeded"),
    Exception: Answer(500, "server_error", "internal_error"),
}
"""Status, type and code of every error; ``Exception`` stands for whatever nobody foresaw."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For a person to read.")
    type: str = Field(description="Kind of error, as in OpenAI's API.")
    param: str | None = Field(description="The parameter at fault.")
    code: str | None = Field(description="For a program to read; stable.")


class ErrorBody(BaseModel):
    """The body of every answer that is not a success; the same shape as OpenAI's."""

    error: ErrorDetail


def render(error: Exception) -> JsonResponse:
    """The one place where an error becomes an HTTP response."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    elif isinstance(error, Overloaded | DailyBudgetSpent | RateExceeded | TooManyAtOnce):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(max(1, math.ceil(error.retry_after_s * 1000)))
    if isinstance(error, DailyBudgetSpent):
        # OpenAI's clients wait no longer than a minute, and would try again until they are told not to.
        headers["x-should-retry"] = "false"
    error = _as_ours(error)
    response = JsonResponse(describe(error).model_dump(), _answer_to(error).status, headers)
    if isinstance(error, Unauthenticated):
        # Programs take the first; a browser asks its user for the second, and any name goes with the key. In a line of
        # its own, for Chromium reads one of each.
        response.headers.append("www-authenticate", 'Bearer realm="wattle"')
        response.headers.append("www-authenticate", 'Basic realm="wattle"')
    return response


def describe(error: Exception) -> ErrorBody:
    """The body of the answer to ``error``."""
    error = _as_ours(error)
    answer = _answer_to(error)
    hidden = "an internal error; the service's log has it under this x-request-id"
    return ErrorBody(
        error=ErrorDetail(
            message=str(error) if is_foreseen(error) else hidden,
            type=answer.type,
            param=getattr(error, "param", None),
            code=answer.code,
        )
    )


def is_foreseen(error: Exception) -> bool:
    """Whether the table knows the error; the message of any other is for the log alone."""
    return _answer_to(_as_ours(error)) is not TABLE[Exception]


def documented(*kinds: type[Exception]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI responses of an operation that may raise ``kinds``."""
    codes: dict[int, list[str]] = {}
    for kind in dict.fromkeys((*kinds, Exception)):
        codes.setdefault(TABLE[kind].status, []).append(TABLE[kind].code)
    return {status: _response(" or ".join(f"`{code}`" for code in names)) for status, names in sorted(codes.items())}


def document(operation: dict[str, Any], *kinds: type[Exception]) -> None:
    """Add to an operation of an OpenAPI document that it may raise ``kinds`` too."""
    responses = operation["responses"]
    for kind in kinds:
        status, code = str(TABLE[kind].status), f"`{TABLE[kind].code}`"
        known = responses.setdefault(status, _response(code))
        if code not in known["description"].split(" or "):
            known["description"] += f" or {code}"


def schemas() -> dict[str, Any]:
    """What the responses of errors refer to, for the components of an OpenAPI document."""
    body = ErrorBody.model_json_schema(ref_template=_SCHEMAS + "{model}")
    return {**body.pop("$defs"), ErrorBody.__name__: body}


def _response(description: str) -> dict[str, Any]:
    # Told as a model, FastAPI would make a validator of its own for each error of each route, at start-up.
    schema = {"$ref": _SCHEMAS + ErrorBody.__name__}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _answer_to(error: Exception) -> Answer:
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        return _from_validation(error)
    return _from_http(error) if isinstance(error, HTTPException) else error


def _from_http(error: HTTPException) -> Exception:
    """Starlette's and FastAPI's own refusals, as ours."""
    match error.status_code:
        case 404:
            return RouteNotFound("there is no such path; /docs lists what there is")
        case 405:
            return MethodNotAllowed("the path exists, but not with this method; /docs lists what there is")
        case 400:
            return MalformedBody(UNREADABLE_BODY)
        case _:
            return error


def _from_validation(error: RequestValidationError) -> WattleError:
    """The first complaint about a request's body, as one of ours."""
    first = error.errors()[0]
    kind, path = first["type"], first["loc"][1:]
    if kind == "json_invalid":
        return no_json(first["ctx"]["error"], first["loc"][-1])
    if not path:
        if kind == "missing":
            return MalformedBody(EMPTY_BODY)
        if isinstance(error.body, bytes):
            return MalformedBody("the body must be JSON, sent with the header content-type: application/json")
        return InvalidValue(None, "the body must be a JSON object")
    return invalid_value(kind, str(path[0]), first["msg"])


def no_json(message: str, place: int) -> MalformedBody:
    """What a parser has to say of a body that is no JSON, as one of ours."""
    return MalformedBody(f"the body is not JSON: {message} at character {place}")


def invalid_value(kind: str, param: str, message: str) -> InvalidValue:
    """What pydantic has to say of a parameter, by the type of its error, as one of ours."""
    if kind == "missing":
        return MissingParameter(param, "this parameter is required")
    if kind == "extra_forbidden":
        return UnknownParameter(param, "there is no such parameter")
    message = message.removeprefix("Value error, ")
    return InvalidValue(param, message[:1].lower() + message[1:])
