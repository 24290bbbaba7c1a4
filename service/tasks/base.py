"""What every task is made of: a request, a result, and the way from text to engine items and back.

Knows nothing of HTTP; a task never waits for anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from models.manifest import ArtefactError, GenerationDefaults, Manifest
from service.engine.types import EncodeOutput, FinishReason, Item, Output, Sampling, WriteOutput
from service.errors import InvalidValue, TooManyTokens
from service.knowledge.store import Passage
from service.models import Model, Models
from service.streaming import Transcript


def read_texts(value: Any) -> list[str]:
    """One text or a list of texts, as a list; refuses empty ones and what is not Unicode."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise PydanticCustomError("texts", "must be a text or a list of texts")
    for place, text in enumerate(texts):
        which = "the text" if isinstance(value, str) else f"text number {place + 1}"
        if not isinstance(text, str):
            raise PydanticCustomError("texts", "{which} is not a text", {"which": which})
        if not text.strip():
            raise PydanticCustomError("texts", "{which} is empty", {"which": which})
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("texts", "{which} holds half a surrogate pair", {"which": which}) from None
    return texts


MAX_DOCUMENT_TOKENS = 65_536
"""Longest text that is read in windows; what one request can ask for must have an end."""
MAX_BEAMS = 8
"""Widest beam search; each beam takes a row of the engine's buffers."""

_TEXT = {"type": "string", "minLength": 1}
Texts = Annotated[
    list[str],
    PlainValidator(read_texts),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}),
]


class TaskRequest(BaseModel):
    """What every task can be asked."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = Field(None, description="Name of a loaded model; the task's default otherwise.")
    truncate: bool = Field(False, description="Cut a text that is too long instead of refusing it.")
    energy_budget_j: float | None = Field(
        None,
        gt=0,
        le=1e12,
        allow_inf_nan=False,
        description="Most joules (`allocated_j`) that the whole request may cost: refused where more is expected, "
        "ended with the `finish_reason` `energy_budget` where writing comes to cost more.",
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that the request may take, waiting included, before the answer is 504; the service's own "
        "limit holds too.",
    )


class TextRequest(TaskRequest):
    """A task on texts that stand alone."""

    input: Texts = Field(description="A text, or a list of them.")


class WritingRequest(TextRequest):
    """A task whose results are written, and may be told while they are."""

    stream: bool = Field(
        False,
        description="Answer with server-sent events: the texts in pieces, and as the last event the whole answer.",
    )


class WrittenText(BaseModel):
    """A text that a model wrote."""

    text: str
    finish_reason: FinishReason = Field(
        description="`stop`: the text ended; `length`: it was cut at its limit; `energy_budget`: it was cut where the "
        "request's budget was spent."
    )


RequestT = TypeVar("RequestT", bound=TaskRequest)
PlanT = TypeVar("PlanT")


@dataclass(frozen=True, slots=True)
class Encoded(Generic[PlanT]):
    """A request as the engine sees it, and what its decoding needs to know besides."""

    items: tuple[Item, ...]
    plan: PlanT


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a request wants from a knowledge base before it is encoded."""

    knowledge_base: str
    questions: Sequence[str]
    passages: int
    """How many for each question."""


class Task(ABC, Generic[RequestT, PlanT]):
    """One task. A subclass is a file of this folder and a line in its tuple; routes, docs and tests follow."""

    name: ClassVar[str]
    summary: ClassVar[str]
    request: ClassVar[type[TaskRequest]]
    result: ClassVar[type[BaseModel]]
    example: ClassVar[Mapping[str, Any]]
    """A request's body, for the docs and the tests."""
    texts: ClassVar[str] = "input"
    """The parameter that holds the texts, one result each."""
    says: ClassVar[str] = "text"
    """The field of a result that a conversation would hear."""
    most_texts: ClassVar[int | None] = None
    """How many texts a request may hold, where that is not the service's to say."""
    in_groups: ClassVar[bool] = False
    """Whether the items of a request are computed in groups, each no larger than a list of texts may be."""

    @abstractmethod
    def check(self, manifest: Manifest) -> None:
        """Raise ``ArtefactError`` where the manifest lacks what this task needs."""

    @abstractmethod
    def encode(self, request: RequestT, model: Model, request_id: str) -> Encoded[PlanT]:
        """Text to engine items; raises ``InvalidValue``."""

    @abstractmethod
    def decode(self, plan: PlanT, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        """The engine's outputs, in the order of the items, to one result per text."""

    def size(self, request: RequestT) -> int:
        """How many texts the request holds, and counts as."""
        return len(getattr(request, self.texts))

    def letters(self, request: RequestT) -> int:
        """How much text the request holds."""
        return sum(map(len, getattr(request, self.texts)))

    def transcript(self, plan: PlanT, model: Model, number: int) -> Transcript | None:
        """What reads the text of an item while it is written; None where it is known only as a whole.

        All of its pieces together begin the text of its result.
        """
        return None

    def result_of(self, plan: PlanT, number: int) -> int:
        """The number of the result that the item of a number belongs to."""
        return number

    def part(self, plan: PlanT, model: Model, outputs: Sequence[Output]) -> str:
        """How the text of a result of several items goes on, now that the last of ``outputs`` is there.

        They are the first of the request's. An item that has a transcript is told by that alone.
        """
        return ""

    def lookup(self, request: RequestT) -> Lookup | None:
        """What ``request`` wants from a knowledge base; None where it wants nothing."""
        return None

    def ground(self, request: RequestT, found: Sequence[Sequence[Passage]]) -> RequestT:
        """``request`` with the passages that were found for each question of its lookup; a task that looks nothing up
        has nothing to add."""
        return request

    def choose(self, request: RequestT, models: Models) -> Model:
        """The model that serves ``request``. Raises ``ModelNotFound``."""
        return models.pick(self.name, request.model)


def encode_text(
    model: Model, text: str, *, param: str, truncate: bool, keep: Literal["start", "end"] = "start"
) -> tuple[int, ...]:
    """Token ids of ``text`` with the model's special tokens around it; a text that is cut keeps its start or end.

    Raises ``TooManyTokens`` unless ``truncate``, and ``InvalidValue`` for a text without a single token.
    """
    ids = encode_readable(model, text, param=param, truncate=truncate, keep=keep)
    if ids is None:
        raise unreadable(param)
    return ids


def encode_readable(
    model: Model, text: str, *, param: str, truncate: bool, keep: Literal["start", "end"] = "start"
) -> tuple[int, ...] | None:
    """As ``encode_text``, but None for a text without a single token."""
    special = model.tokenizer.num_special_tokens_to_add(is_pair=False)
    encoding, allowed = model.tokenizer.encode(text), model.manifest.max_input_tokens - special
    tokens = len(encoding) - special
    if not tokens:
        return None
    if tokens > allowed:
        refuse_longer(tokens, allowed, param=param, truncate=truncate)
        # What is cut is cut without them.
        encoding = model.tokenizer.encode(text, add_special_tokens=False)
        encoding.truncate(allowed, direction="right" if keep == "start" else "left")
        encoding = model.tokenizer.post_process(encoding)
    return tuple(encoding.ids)


def refuse_longer(tokens: int, allowed: int, *, param: str, truncate: bool) -> None:
    """Raise ``TooManyTokens`` for a text that must not be cut and doesn't fit."""
    if tokens > allowed and not truncate:
        raise TooManyTokens(param, tokens, allowed)


def unreadable(param: str) -> InvalidValue:
    """The error for a text of nothing but characters that the model's tokenizer drops."""
    return InvalidValue(param, "the text holds no character that the model can read")


def check_writer(manifest: Manifest) -> None:
    """Raise ``ArtefactError`` for a manifest that cannot write text."""
    config = manifest.config
    if config.head != "lm" or manifest.max_output_tokens < generation(manifest).max_tokens:
        raise ArtefactError("manifest.json: writing needs an lm head and max_output_tokens above the default")
    if config.architecture == "encoder-decoder":
        if manifest.special_ids.bos is None:
            raise ArtefactError("manifest.json: an encoder-decoder needs the special id bos")
    elif manifest.max_input_tokens + 1 >= config.max_positions:
        raise ArtefactError("manifest.json: max_input_tokens leaves no position to write in")


def frame(manifest: Manifest) -> tuple[int, int]:
    """The ids of ``[CLS]`` and ``[SEP]``. Raises ``ArtefactError`` where the manifest has none."""
    special = manifest.special_ids
    if special.cls is None or special.sep is None:
        raise ArtefactError("manifest.json: the task needs the special ids cls and sep")
    return special.cls, special.sep


def generation(manifest: Manifest) -> GenerationDefaults:
    """The manifest's defaults for writing. Raises ``ArtefactError`` where it has none."""
    if manifest.generation is None:
        raise ArtefactError("manifest.json: writing needs generation defaults")
    return manifest.generation


def sampling(model: Model, prompt_tokens: int, **chosen: Any) -> Sampling:
    """How to write after a prompt: the manifest's defaults, and over them what is ``chosen`` and not None.

    Raises ``InvalidValue`` for more tokens than the model writes.
    """
    manifest = model.manifest
    defaults = Sampling(**generation(manifest).model_dump())
    wanted = replace(defaults, **{name: value for name, value in chosen.items() if value is not None})
    if wanted.max_tokens > manifest.max_output_tokens:
        raise InvalidValue("max_tokens", f"the model writes at most {manifest.max_output_tokens} tokens")
    if manifest.config.architecture == "encoder-decoder":
        return wanted
    # Prompt, first input and text share the model's positions.
    return replace(wanted, max_tokens=min(wanted.max_tokens, manifest.config.max_positions - prompt_tokens - 1))


def written(output: Output) -> WriteOutput:
    """The output of an item that was to be written."""
    if not isinstance(output, WriteOutput):
        raise TypeError(f"the engine answered an item to write with {type(output).__name__}")
    return output


def scored(output: Output) -> NDArray[np.float32]:
    """The logits of an item that was to be encoded or extracted."""
    if not isinstance(output, EncodeOutput):
        raise TypeError(f"the engine answered an item to score with {type(output).__name__}")
    return output.logits
