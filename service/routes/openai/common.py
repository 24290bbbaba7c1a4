"""What OpenAI's ways to ask for text share: parameters, messages, usage, probabilities and the form of a chunk."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field

from service.conversation import Asked
from service.core import Receipt
from service.errors import InvalidValue, documented
from service.models import Model
from service.routes.common import TASK_ERRORS, Energy, energy_of, service_of
from service.routes.sse import event
from service.tasks.generate import GeneratedText, Turn

ERRORS = documented(*TASK_ERRORS)


class Lenient(BaseModel):
    """A body that may hold more: for the model's task, which leaves alone what it doesn't know."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Part(Lenient):
    """A part of a message."""

    type: str = Field(description="`text`, `input_text`, `output_text` or `refusal`; nothing else can be read.")
    text: str | None = None
    refusal: str | None = None

    def says(self, param: str) -> str:
        """Its text. Raises ``InvalidValue`` where it is anything else."""
        text = self.refusal if self.type == "refusal" else self.text
        if text is None or not self.type.endswith(("text", "refusal")):
            raise InvalidValue(param, f"a part of the type {self.type!r} cannot be read; send text")
        return text


class Message(Lenient):
    """One message of a conversation."""

    role: str = Field(min_length=1)
    content: str | list[Part] | None = None

    def turn(self, param: str) -> Turn:
        """The message as tasks know it. Raises ``InvalidValue`` where it holds anything but text."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Turn(role=role, content=self.content)
        return Turn(role=role, content="".join(part.says(param) for part in self.content or ()))


class Writing(Lenient):
    """What every request for text may say."""

    model: str | None = Field(None, description="Name or alias of a loaded model; the default one that generates.")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    stream: bool | None = None

    def wishes(self) -> dict[str, Any]:
        """Its parameters, those that the dialect doesn't name too."""
        named = {"temperature": self.temperature, "top_p": self.top_p or None}
        # Of the likeliest tokens that are nothing together, the first is left.
        return {**(self.model_extra or {}), **named, **({"top_k": 1} if self.top_p == 0 else {})}


class StreamOptions(Lenient):
    """What a stream tells besides."""

    include_usage: bool | None = Field(None, description="Tell tokens and energy in an event of its own, the last.")


class Completing(Writing):
    """What both kinds of completion may say besides."""

    max_tokens: int | None = Field(None, ge=1, description="Most tokens to write; the model's own limit holds too.")
    n: int | None = Field(None, ge=1, description="Texts to write.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, description="Up to four texts that end the writing.")
    stream_options: StreamOptions | None = None

    def wishes(self) -> dict[str, Any]:
        """See ``Writing``."""
        seed = None if self.seed is None else self.seed % 2**63
        return super().wishes() | {"max_tokens": self.max_tokens, "n": self.n, "seed": seed, "stop": self.stop}


class Usage(BaseModel):
    """Tokens and energy of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    energy: Energy


class TopLogprob(BaseModel):
    """A token that could stand at a place."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="Null for a part of a letter.")


class TokenLogprob(TopLogprob):
    """A token that was written."""

    top_logprobs: list[TopLogprob]


class CompletionScript(ABC):
    """Tells a completion; see ``Script``. ``kind`` is the object that a chunk says it is."""

    kind: ClassVar[str]
    names: Mapping[str, str]

    def __init__(self, asked: Asked, options: StreamOptions | None) -> None:
        self.asked = asked
        self._tells_usage = bool(options and options.include_usage)
        self._created = int(time.time())
        self._head: dict[str, Any] = {}

    def head(self, receipt: Receipt) -> dict[str, Any]:
        """What every chunk, and the whole, begins with."""
        return {
            "id": receipt.request_id,
            "created": self._created,
            "model": receipt.model.name,
            "system_fingerprint": receipt.model.manifest.revision,
        }

    def opening(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        self._head = {**self.head(receipt), "object": self.kind}
        return iter(())

    def closing(self, receipt: Receipt) -> Iterator[bytes]:
        """See ``Script``."""
        for number, result in enumerate(receipt.results):
            yield self.chunk(number, self.last(result), finish_reason(result))
        if self._tells_usage:
            yield event({**self._head, "choices": [], "usage": usage(receipt).model_dump()})
        yield b"data: [DONE]\n\n"

    @abstractmethod
    def last(self, result: BaseModel) -> dict[str, Any]:
        """What the last chunk of a text says of it, every piece being told."""

    def chunk(self, number: int, choice: Mapping[str, Any], finished: str | None = None) -> bytes:
        """An event about the text of a number."""
        silent = {"usage": None} if self._tells_usage else {}
        choices = [{"index": number, "logprobs": None, **choice, "finish_reason": finished}]
        return event({**self._head, "choices": choices, **silent})


def model_of(http: Request, name: str | None) -> Model:
    """The model that a body names, else the default one that generates. Raises ``ModelNotFound``."""
    models = service_of(http).models
    return models.pick("generate", None) if name is None else models.named(name)


def refuse_format(wanted: Mapping[str, Any] | None, param: str) -> None:
    """Raise ``InvalidValue`` where anything but plain text is wanted."""
    kind = (wanted or {}).get("type", "text")
    if kind != "text":
        raise InvalidValue(param, f"the format {kind!r} is not supported: the models write plain text")


def refuse_tools(choice: Any) -> None:
    """Raise ``InvalidValue`` where a tool must be called."""
    if choice == "required" or isinstance(choice, dict):
        raise InvalidValue("tool_choice", "the models call no tools; leave it out")


def usage(receipt: Receipt) -> Usage:
    """The tokens and the bill of a request that is over."""
    return Usage(
        prompt_tokens=receipt.input_tokens,
        completion_tokens=receipt.output_tokens,
        total_tokens=receipt.input_tokens + receipt.output_tokens,
        energy=energy_of(receipt.bill),
    )


def finish_reason(result: BaseModel) -> str:
    """Why a text ended: at `length` where tokens or joules gave out. What is found or judged instead is whole."""
    return "stop" if getattr(result, "finish_reason", "stop") == "stop" else "length"


def logprobs_of(result: BaseModel) -> list[TokenLogprob] | None:
    """How likely the tokens of a result were; None where nobody asked."""
    if not isinstance(result, GeneratedText) or result.logprobs is None:
        return None
    return [
        TokenLogprob(
            token=each.token,
            logprob=each.logprob,
            bytes=_bytes(each.token),
            top_logprobs=[
                TopLogprob(token=top.token, logprob=top.logprob, bytes=_bytes(top.token)) for top in each.likeliest
            ],
        )
        for each in result.logprobs
    ]


def example(body: Mapping[str, Any]) -> dict[str, Any]:
    """An example of a request, for the OpenAPI document."""
    return {"requestBody": {"content": {"application/json": {"example": body}}}}


def _bytes(token: str) -> list[int] | None:
    return None if "\ufffd" in token else list(token.encode())
