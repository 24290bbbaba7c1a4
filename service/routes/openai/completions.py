"""Completions: every model continues texts, or does its task on them."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.conversation import ask
from service.core import Receipt
from service.errors import InvalidValue, renaming
from service.routes.openai.common import (
    ERRORS,
    Completing,
    CompletionScript,
    Usage,
    example,
    finish_reason,
    logprobs_of,
    model_of,
    usage,
)
from service.routes.sse import respond, streamed


class CompletionRequest(Completing):
    """Texts to continue; a model for another task does that task on them."""

    prompt: str | list[str] = Field(description="A text, or a list of them.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Tell how likely each token was, and this many others."
    )
    echo: bool | None = Field(None, description="Not supported.")
    suffix: str | None = Field(None, description="Not supported: texts are continued at their end.")

    def wishes(self) -> dict[str, Any]:
        """See ``Writing``."""
        return super().wishes() | {"logprobs": self.logprobs, "chat": False}


class ListedLogprobs(BaseModel):
    """How likely the tokens of a text were: lists side by side, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts."""

    index: int
    text: str
    logprobs: ListedLogprobs | None
    finish_reason: str = Field(description="`stop` or `length`.")


class CompletionResponse(BaseModel):
    """The continuations, those of one prompt side by side."""

    id: str = Field(description="Names the request in the ledger.")
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="The model's revision.")
    choices: list[CompletionChoice]
    usage: Usage


def add_completions(router: APIRouter) -> None:
    """Add the route."""

    @router.post(
        "/completions",
        operation_id="completions",
        summary="OpenAI: continue texts, or do a model's task on them",
        response_model=CompletionResponse,
        responses=ERRORS | streamed("With `stream`: OpenAI's `text_completion`, and last `[DONE]`."),
        openapi_extra=example({"prompt": "The river rises in", "max_tokens": 16, "seed": 1}),
    )
    async def complete(body: CompletionRequest, http: Request) -> Response:
        for param in ("echo", "suffix"):
            if getattr(body, param):
                raise InvalidValue(param, "is not supported: texts are continued at their end")
        model = model_of(http, body.model)
        with renaming(_Completions.names):
            asked = ask(model, body.prompt, body.wishes())
        script = _Completions(asked, body.stream_options)
        return await respond(http, asked.task, asked.request, script, stream=bool(body.stream))


class _Completions(CompletionScript):
    kind: ClassVar[str] = "text_completion"
    names: Mapping[str, str] = dict.fromkeys(("input", "question", "context"), "prompt")

    def whole(self, receipt: Receipt) -> dict[str, Any]:
        """See ``Script``."""
        choices = [
            CompletionChoice(
                index=number,
                text=getattr(result, self.asked.task.says),
                logprobs=_logprobs(result),
                finish_reason=finish_reason(result),
            )
            for number, result in enumerate(receipt.results)
        ]
        return CompletionResponse(**self.head(receipt), choices=choices, usage=usage(receipt)).model_dump()

    def piece(self, number: int, text: str) -> Iterator[bytes]:
        """See ``Script``."""
        yield self.chunk(number, {"text": text})

    def last(self, result: BaseModel) -> dict[str, Any]:
        """See ``CompletionScript``."""
        logprobs = _logprobs(result)
        return {"text": "", "logprobs": logprobs and logprobs.model_dump()}


def _logprobs(result: BaseModel) -> ListedLogprobs | None:
    tokens = logprobs_of(result)
    if tokens is None:
        return None
    offsets = [0]
    for each in tokens:
        offsets.append(offsets[-1] + len(each.token))
    return ListedLogprobs(
        tokens=[each.token for each in tokens],
        token_logprobs=[each.logprob for each in tokens],
        top_logprobs=[{top.token: top.logprob for top in each.top_logprobs} for each in tokens],
        text_offset=offsets[:-1],
    )
