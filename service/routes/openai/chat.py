"""Chat completions: every model goes on with a conversation, or does its task on the last message of one."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.conversation import ask_turn
from service.core import Receipt
from service.errors import InvalidValue, renaming
from service.models import Model
from service.routes.openai.common import (
    ERRORS,
    Completing,
    CompletionScript,
    Message,
    TokenLogprob,
    Usage,
    example,
    finish_reason,
    logprobs_of,
    model_of,
    refuse_format,
    refuse_tools,
    usage,
)
from service.routes.sse import respond, streamed
from service.tasks.base import WrittenText


class ChatRequest(Completing):
    """A conversation to go on with; a model for another task does that task on its last message."""

    messages: list[Message] = Field(min_length=1, description="The last one must be the user's.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of `max_tokens`.")
    logprobs: bool | None = Field(None, description="Tell how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And this many of the likeliest at its place.")
    response_format: dict[str, Any] | None = Field(None, description="Nothing but `text` can be had.")
    tool_choice: Any = Field(None, description="No tool is ever called: what demands one is refused.")

    def wishes(self) -> dict[str, Any]:
        """See ``Writing``."""
        wishes = super().wishes()
        wishes["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        if self.max_completion_tokens is not None:
            wishes["max_tokens"] = self.max_completion_tokens
        return wishes


class Logprobs(BaseModel):
    """How likely the tokens of a text were."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """What the model says: the text that it wrote, the answer that it found, or its judgement."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the texts."""

    index: int
    message: AssistantMessage
    logprobs: Logprobs | None
    finish_reason: str = Field(description="`stop` or `length`.")
    result: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda result: result is None,
        description="What the task found or judged, as its native route tells it; only where it wrote nothing.",
    )


class ChatResponse(BaseModel):
    """The answer to a conversation."""

    id: str = Field(description="Names the request in the ledger.")
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = Field(description="The model's revision.")
    choices: list[ChatChoice]
    usage: Usage


def add_chat(router: APIRouter) -> None:
    """Add the route."""

    @router.post(
        "/chat/completions",
        operation_id="chat_completions",
        summary="OpenAI: go on with a conversation, or do a model's task on its last message",
        response_model=ChatResponse,
        responses=ERRORS | streamed("With `stream`: OpenAI's `chat.completion.chunk`, and last `[DONE]`."),
        openapi_extra=example({"messages": [{"role": "user", "content": "Would you like a cup of coffee?"}]}),
    )
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await answer_chat(http, body, model_of(http, body.model))


async def answer_chat(http: Request, body: ChatRequest, model: Model) -> Response:
    """Let ``model`` go on with a conversation."""
    refuse_format(body.response_format, "response_format")
    refuse_tools(body.tool_choice)
    if body.top_logprobs and not body.logprobs:
        raise InvalidValue("top_logprobs", 'goes with "logprobs": true')
    turns = [message.turn("messages") for message in body.messages]
    with renaming(_Chat.names):
        asked = ask_turn(model, turns, body.wishes())
    script = _Chat(asked, body.stream_options)
    return await respond(http, asked.task, asked.request, script, stream=bool(body.stream))


class _Chat(CompletionScript):
    kind: ClassVar[str] = "chat.completion.chunk"
    names: Mapping[str, str] = dict.fromkeys(("input", "question", "context", "history"), "messages")

    def whole(self, receipt: Receipt) -> dict[str, Any]:
        """See ``Script``."""
        choices = [
            ChatChoice(
                index=number,
                message=AssistantMessage(content=getattr(result, self.asked.task.says)),
                logprobs=_logprobs(result),
                finish_reason=finish_reason(result),
                result=None if isinstance(result, WrittenText) else result.model_dump(),
            )
            for number, result in enumerate(receipt.results)
        ]
        return ChatResponse(**self.head(receipt), choices=choices, usage=usage(receipt)).model_dump()

    def opening(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        yield from super().opening(receipt)
        for number in range(self.asked.task.size(self.asked.request)):
            yield self.chunk(number, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, number: int, text: str) -> Iterator[bytes]:
        """See ``Script``."""
        yield self.chunk(number, {"delta": {"content": text}})

    def last(self, result: BaseModel) -> dict[str, Any]:
        """See ``CompletionScript``."""
        logprobs = _logprobs(result)
        return {"delta": {}, "logprobs": logprobs and logprobs.model_dump()}


def _logprobs(result: BaseModel) -> Logprobs | None:
    content = logprobs_of(result)
    return None if content is None else Logprobs(content=content)
