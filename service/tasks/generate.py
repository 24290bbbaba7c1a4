"""Generation: an answer to a user's turn, or the continuation of a raw text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from tokenizers import Tokenizer

from models.manifest import Manifest
from service.chat import ChatTemplate, TemplateRefusal
from service.engine.types import Output, WriteItem
from service.errors import InvalidValue
from service.models import Model
from service.streaming import PlainTranscript, Transcript, cut_at_stop
from service.tasks.base import (
    Encoded,
    Task,
    WritingRequest,
    WrittenText,
    check_writer,
    encode_text,
    refuse_longer,
    sampling,
    unreadable,
    written,
)

MAX_STOPS = 4


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError("stop", "must be a text or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", "holds more than {most} texts", {"most": MAX_STOPS})
    return tuple(stops)


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_read_stop),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
    ),
]


class GenerateRequest(WritingRequest):
    """Texts to answer or to continue, and how to choose the words."""

    chat: bool = Field(True, description="Read the input as a user's turn, if the model chats; else continue it.")
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens to write; fewer where the model's context ends."
    )
    temperature: float | None = Field(
        None, ge=0, le=2, allow_inf_nan=False, description="0 always takes the likeliest token."
    )
    top_k: int | None = Field(None, ge=0, description="Choose among this many tokens; 0 among all.")
    top_p: float | None = Field(
        None, gt=0, le=1, allow_inf_nan=False, description="Choose among the likeliest tokens of this probability."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="The same seed and request give the same text, alone or in a list."
    )
    stop: Stop = Field((), description="Up to four texts that end the writing; they are not part of the result.")


@dataclass(frozen=True, slots=True)
class GeneratePlan:
    """What decoding needs to know of a request."""

    stop: tuple[str, ...]


class Generate(Task[GenerateRequest, GeneratePlan]):
    """A causal language model."""

    name = "generate"
    summary = "Answer a user's turn, or continue a text"
    request = GenerateRequest
    result = WrittenText
    example: ClassVar[Mapping[str, Any]] = {
        "input": "Name three trees.",
        "max_tokens": 32,
        "temperature": 0.7,
        "seed": 1,
        "stop": ["\n\n"],
    }

    def check(self, manifest: Manifest) -> None:
        check_writer(manifest)

    def encode(self, request: GenerateRequest, model: Model, request_id: str) -> Encoded[GeneratePlan]:
        chat = model.chat if request.chat else None
        should_stop = stopper(model.tokenizer, request.stop)
        items = []
        for text in request.input:
            if chat:
                ids = _chat_prompt(chat, model, text, request.truncate)
            else:
                # What a model continues is the end of a text.
                ids = encode_text(model, text, param="input", truncate=request.truncate, keep="end")
            how = sampling(
                model,
                len(ids),
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=request.seed,
            )
            items.append(WriteItem(request_id, ids, how, should_stop))
        return Encoded(tuple(items), GeneratePlan(request.stop))

    def transcript(self, plan: GeneratePlan, model: Model, number: int) -> Transcript:
        return PlainTranscript(model.tokenizer, plan.stop)

    def decode(self, plan: GeneratePlan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        results: list[BaseModel] = []
        for output in map(written, outputs):
            whole = model.tokenizer.decode(output.output_ids)
            text = cut_at_stop(whole, plan.stop)
            stopped = len(text) < len(whole)
            if output.finish_reason == "length" and not stopped:
                # The limit may fall inside a character of several bytes.
                text = text.rstrip("\ufffd")
            results.append(WrittenText(text=text, finish_reason="stop" if stopped else output.finish_reason))
        return results


def stopper(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
    """Whether the ids written so far contain a stop text; None without stop texts."""
    if not stop:
        return None
    # Every visible token is at least a byte, so a stop text that has just ended lies within this many of them;
    # the rest is room for tokens that decode to nothing and for a character cut at the window's start.
    window = max(len(text.encode("utf-8", "replace")) for text in stop) + 8

    def should_stop(ids: Sequence[int]) -> bool:
        tail = tokenizer.decode(ids[-window:])
        return any(text in tail for text in stop)

    return should_stop


def _chat_prompt(chat: ChatTemplate, model: Model, text: str, truncate: bool) -> tuple[int, ...]:
    """The text as a user's turn; only the turn is ever cut, at its end."""
    try:
        pieces = chat.encode([{"role": "user", "content": text}], model.tokenizer)
    except TemplateRefusal as error:
        raise InvalidValue("input", f"the model's chat template refuses it: {error}") from error
    frame = sum(len(ids) for message, ids in pieces if message is None)
    turn = sum(len(ids) for message, ids in pieces if message is not None)
    if not turn:
        raise unreadable("input")
    allowed = max(0, model.manifest.max_input_tokens - frame)
    refuse_longer(turn, allowed, param="input", truncate=truncate)
    return tuple(token for message, ids in pieces for token in (ids if message is None else ids[:allowed]))
