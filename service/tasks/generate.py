"""Generation: an answer to a user's turn, or the continuation of a raw text."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from tokenizers import Tokenizer

from models.manifest import Manifest
from service.chat import ChatTemplate, Message, TemplateRefusal
from service.engine.types import Output, WriteItem, WriteOutput
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
MAX_LOGPROBS = 20


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


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: str = Field(min_length=1, description="`user`, `assistant`, `system`, or what else the model knows.")
    content: str


class GenerateRequest(WritingRequest):
    """Texts to answer or to continue, and how to choose the words."""

    history: list[Turn] = Field(
        [], description="The conversation before the input, oldest turn first; `truncate` drops turns there."
    )
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
    n: int = Field(1, ge=1, description="Texts to write for each input; the seeds of the others follow the first's.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Tell each token's log probability, and this many of the likeliest."
    )

    @model_validator(mode="after")
    def _history_is_of_a_chat(self) -> Self:
        if self.history and not self.chat:
            raise InvalidValue("history", "goes with chat")
        return self


class LikelyToken(BaseModel):
    """A token that could stand at a place."""

    token: str = Field(description="Its text there; `\ufffd` for a part of a letter.")
    logprob: float = Field(description="Natural logarithm of its probability, before temperature and the like.")


class WrittenToken(LikelyToken):
    """A token that was written."""

    likeliest: list[LikelyToken] = Field(description="The likeliest at its place, which need not hold it.")


class GeneratedText(WrittenText):
    """A text that a language model wrote."""

    logprobs: list[WrittenToken] | None = Field(
        None, exclude_if=lambda tokens: tokens is None, description="Of each token; only where they were asked for."
    )


@dataclass(frozen=True, slots=True)
class GeneratePlan:
    """What decoding needs to know of a request."""

    stop: tuple[str, ...]
    tells_logprobs: bool


class Generate(Task[GenerateRequest, GeneratePlan]):
    """A causal language model."""

    name = "generate"
    summary = "Answer a user's turn, or continue a text"
    request = GenerateRequest
    result = GeneratedText
    example: ClassVar[Mapping[str, Any]] = {
        "input": "Name three trees.",
        "max_tokens": 32,
        "temperature": 0.7,
        "seed": 1,
        "stop": ["\n\n"],
    }

    def check(self, manifest: Manifest) -> None:
        check_writer(manifest)

    def size(self, request: GenerateRequest) -> int:
        return len(request.input) * request.n

    def letters(self, request: GenerateRequest) -> int:
        return super().letters(request) + sum(len(turn.content) for turn in request.history)

    def encode(self, request: GenerateRequest, model: Model, request_id: str) -> Encoded[GeneratePlan]:
        chat = model.chat if request.chat else None
        should_stop = stopper(model.tokenizer, request.stop)
        items = []
        for text in request.input:
            if chat:
                ids = _chat_prompt(chat, model, request.history, text, request.truncate)
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
                logprobs=request.logprobs,
            )
            for number in range(request.n):
                seed = None if request.seed is None else (request.seed + number) % 2**63
                items.append(WriteItem(request_id, ids, replace(how, seed=seed), should_stop))
        return Encoded(tuple(items), GeneratePlan(request.stop, request.logprobs is not None))

    def transcript(self, plan: GeneratePlan, model: Model, number: int) -> Transcript:
        return PlainTranscript(model.tokenizer, plan.stop)

    def decode(self, plan: GeneratePlan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        results: list[BaseModel] = []
        for output in map(written, outputs):
            whole = model.tokenizer.decode(output.output_ids)
            text = cut_at_stop(whole, plan.stop)
            stopped = len(text) < len(whole)
            if output.finish_reason != "stop" and not stopped:
                # The limit may fall inside a character of several bytes.
                text = text.rstrip("\ufffd")
            results.append(
                GeneratedText(
                    text=text,
                    finish_reason="stop" if stopped else output.finish_reason,
                    logprobs=list(_tell(model.tokenizer, output)) if plan.tells_logprobs else None,
                )
            )
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


def _tell(tokenizer: Tokenizer, output: WriteOutput) -> Iterator[WrittenToken]:
    control = {token: each.content for token, each in tokenizer.get_added_tokens_decoder().items() if each.special}
    before: tuple[int, ...] = ()

    def text(token: int) -> str:
        # What a token says may depend on the one before it: a space, or none.
        start = len(tokenizer.decode(before))
        return control.get(token) or tokenizer.decode((*before, token))[start:] or "\ufffd"

    for token, told in zip(output.output_ids, output.logprobs, strict=True):
        likeliest = [LikelyToken(token=text(each), logprob=logprob) for each, logprob in told.likeliest]
        yield WrittenToken(token=text(token), logprob=told.logprob, likeliest=likeliest)
        before = (token,)


def _chat_prompt(
    chat: ChatTemplate, model: Model, history: Sequence[Turn], text: str, truncate: bool
) -> tuple[int, ...]:
    """The text as a user's turn after ``history``.

    Of what is too long the oldest turns go, from one of a user to the next; what the conversation opens with, such as
    a system's message, stays. A turn alone is cut at its end.
    """
    turns = [turn.model_dump() for turn in history] + [{"role": "user", "content": text}]
    limit = model.manifest.max_input_tokens
    pieces = _render(chat, model, turns)
    if _size(pieces) > limit and truncate:
        users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
        opening = turns[: users[0]]
        fitting = bisect_left(
            users[:-1], True, key=lambda first: _size(_render(chat, model, opening + turns[first:])) <= limit
        )
        turns = opening + turns[users[fitting] :]
        pieces = _render(chat, model, turns)
    own = sum(len(ids) for message, ids in pieces if message == len(turns) - 1)
    if not own:
        raise unreadable("input")
    allowed = max(0, limit - (_size(pieces) - own))
    refuse_longer(own, allowed, param="input", truncate=truncate)
    last = len(turns) - 1
    return tuple(token for message, ids in pieces for token in (ids[:allowed] if message == last else ids))


def _render(chat: ChatTemplate, model: Model, turns: Sequence[Message]) -> list[tuple[int | None, list[int]]]:
    try:
        return chat.encode(turns, model.tokenizer)
    except TemplateRefusal as error:
        raise InvalidValue("input", f"the model's chat template refuses it: {error}") from error


def _size(pieces: Sequence[tuple[int | None, list[int]]]) -> int:
    return sum(len(ids) for _, ids in pieces)
