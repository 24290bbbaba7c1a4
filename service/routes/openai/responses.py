"""Responses: OpenAI's newer way to go on with a conversation. Nothing is stored: each request brings all of it."""

import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.conversation import ask_turn
from service.core import Receipt
from service.errors import InvalidValue, renaming
from service.routes.common import Energy, energy_of
from service.routes.openai.common import (
    ERRORS,
    Message,
    TokenLogprob,
    Writing,
    example,
    finish_reason,
    logprobs_of,
    model_of,
    refuse_format,
    refuse_tools,
)
from service.routes.sse import event, respond, streamed
from service.tasks.base import Task
from service.tasks.generate import Turn

LOGPROBS = "message.output_text.logprobs"
_NOT_STORED = "Not supported: nothing is stored."


class ResponseRequest(Writing):
    """A conversation to go on with; a model for another task does that task on its last message."""

    input: str | list[Message] = Field(description="A user's message, or a conversation that ends in one.")
    instructions: str | None = Field(None, description="A system's message before the conversation.")
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens to write; the model's own limit holds too."
    )
    include: list[str] | None = Field(None, description=f"`{LOGPROBS}` tells how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And this many of the likeliest at its place.")
    text: dict[str, Any] | None = Field(None, description="Its `format` can be nothing but `text`.")
    tool_choice: Any = Field(None, description="No tool is ever called: what demands one is refused.")
    previous_response_id: str | None = Field(None, description=_NOT_STORED)
    conversation: Any = Field(None, description=_NOT_STORED)
    prompt: Any = Field(None, description=_NOT_STORED)
    background: bool | None = Field(None, description="Not supported.")
    metadata: dict[str, str] | None = Field(None, description="Told again in the answer.")

    def wishes(self) -> dict[str, Any]:
        """See ``Writing``."""
        wanted = LOGPROBS in (self.include or ()) or self.top_logprobs
        own = {"max_tokens": self.max_output_tokens, "logprobs": (self.top_logprobs or 0) if wanted else None}
        return super().wishes() | own

    def turns(self) -> list[Turn]:
        """The conversation as tasks know it. Raises ``InvalidValue``."""
        messages = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        before = [Turn(role="system", content=self.instructions)] if self.instructions else []
        return [*before, *(message.turn("input") for message in messages)]


class OutputText(BaseModel):
    """What the model says."""

    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[None] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(BaseModel):
    """The message that holds it."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    content: list[OutputText] = []


class InputDetails(BaseModel):
    """Nothing read is kept for later requests."""

    cached_tokens: Literal[0] = 0
    cache_write_tokens: Literal[0] = 0


class OutputDetails(BaseModel):
    """Nothing is written that is not told."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    """Tokens and energy of a request."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int
    energy: Energy


class Incomplete(BaseModel):
    """Why a text was cut."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """The answer to a conversation."""

    id: str = Field(description="Names the request in the ledger.")
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"
    error: None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: Literal[False] = False
    temperature: float | None
    tool_choice: Literal["none"] = "none"
    tools: list[None] = []
    top_p: float | None
    usage: ResponseUsage | None = None


def add_responses(router: APIRouter) -> None:
    """Add the route."""

    @router.post(
        "/responses",
        operation_id="responses",
        summary="OpenAI: go on with a conversation, or do a model's task on its last message",
        response_model=ResponseObject,
        responses=ERRORS | streamed("With `stream`: OpenAI's events, `response.created` to `response.completed`."),
        openapi_extra=example({"input": "Would you like a cup of coffee?"}),
    )
    async def respond_to(body: ResponseRequest, http: Request) -> Response:
        refuse_format((body.text or {}).get("format"), "text")
        refuse_tools(body.tool_choice)
        for param in ("previous_response_id", "conversation", "prompt"):
            if getattr(body, param) is not None:
                raise InvalidValue(param, "nothing is stored; send the whole conversation as input")
        if body.background:
            raise InvalidValue("background", "is not supported; wait, or stream")
        turns = body.turns()
        if not turns:
            raise InvalidValue("input", "holds no message")
        model = model_of(http, body.model)
        with renaming(_Response.names):
            asked = ask_turn(model, turns, body.wishes())
        return await respond(http, asked.task, asked.request, _Response(body, asked.task), stream=bool(body.stream))


class _Response:
    """Tells a response; see ``Script``."""

    names: Mapping[str, str] = {
        **dict.fromkeys(("question", "context", "history"), "input"),
        "max_tokens": "max_output_tokens",
    }

    def __init__(self, body: ResponseRequest, task: Task[Any, Any]) -> None:
        self._body, self._task = body, task
        self._created = int(time.time())
        self._numbers = count()
        self._place: dict[str, Any] = {}
        """Where in the answer the text stands."""

    def whole(self, receipt: Receipt) -> dict[str, Any]:
        """See ``Script``."""
        return self._finished(receipt).model_dump()

    def opening(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        begun = self._begun(receipt).model_dump()
        self._place = {"item_id": self._message(receipt).id, "output_index": 0, "content_index": 0}
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._message(receipt).model_dump())
        yield self._event("response.content_part.added", **self._place, part=OutputText().model_dump())

    def piece(self, number: int, text: str) -> Iterator[bytes]:
        """See ``Script``."""
        yield self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def closing(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        finished = self._finished(receipt)
        (message,) = finished.output
        (part,) = message.content
        told = {"text": part.text, "logprobs": [each.model_dump() for each in part.logprobs]}
        yield self._event("response.output_text.done", **self._place, **told)
        yield self._event("response.content_part.done", **self._place, part=part.model_dump())
        yield self._event("response.output_item.done", output_index=0, item=message.model_dump())
        yield self._event(f"response.{finished.status}", response=finished.model_dump())

    def _event(self, kind: str, **content: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **content}, name=kind)

    def _begun(self, receipt: Receipt) -> ResponseObject:
        return ResponseObject(
            id=receipt.request_id,
            created_at=self._created,
            instructions=self._body.instructions,
            metadata=self._body.metadata or {},
            model=receipt.model.name,
            temperature=self._body.temperature,
            top_p=self._body.top_p,
        )

    def _message(self, receipt: Receipt) -> OutputMessage:
        return OutputMessage(id=f"msg-{receipt.request_id.removeprefix('req-')}")

    def _finished(self, receipt: Receipt) -> ResponseObject:
        (result,) = receipt.results
        cut = finish_reason(result) == "length"
        status: Literal["completed", "incomplete"] = "incomplete" if cut else "completed"
        part = OutputText(text=getattr(result, self._task.says), logprobs=logprobs_of(result) or [])
        message = self._message(receipt).model_copy(update={"status": status, "content": [part]})
        used = ResponseUsage(
            input_tokens=receipt.input_tokens,
            output_tokens=receipt.output_tokens,
            total_tokens=receipt.input_tokens + receipt.output_tokens,
            energy=energy_of(receipt.bill),
        )
        whole = {"status": status, "output": [message], "usage": used}
        return self._begun(receipt).model_copy(update=whole | {"incomplete_details": Incomplete() if cut else None})
