"""Summarisation: a document told shorter, or its most telling sentences picked out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from models.manifest import Manifest
from models.sentences import split_sentences
from service.engine.types import ExtractItem, Output, WriteItem
from service.errors import InvalidValue
from service.models import Model
from service.prose import Restorer
from service.streaming import PlainTranscript, Transcript
from service.tasks.base import (
    MAX_BEAMS,
    MAX_DOCUMENT_TOKENS,
    Encoded,
    Task,
    WritingRequest,
    WrittenText,
    check_writer,
    encode_text,
    frame,
    refuse_longer,
    sampling,
    scored,
    unreadable,
    written,
)

DEFAULT_SENTENCES = 3


class SummarizeRequest(WritingRequest):
    """Documents to summarise."""

    mode: Literal["abstractive", "extractive"] = Field(
        "abstractive", description="Write a summary, or pick sentences of a document, however long."
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to write (abstractive).")
    beams: int | None = Field(
        None, ge=1, le=MAX_BEAMS, description="Width of the beam search; 1 is greedy (abstractive)."
    )
    sentences: int | None = Field(
        None, ge=1, description=f"Sentences to pick (extractive); {DEFAULT_SENTENCES} by default."
    )

    @model_validator(mode="after")
    def _fits_mode(self) -> Self:
        if self.mode == "abstractive" and self.sentences is not None:
            raise InvalidValue("sentences", "goes with the mode extractive")
        for name in ("max_tokens", "beams"):
            if self.mode == "extractive" and getattr(self, name) is not None:
                raise InvalidValue(name, "goes with the mode abstractive")
        return self


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring sentences of a document as one sequence for the model."""

    input_ids: tuple[int, ...]
    sentences: tuple[str, ...]
    starts: tuple[int, ...]
    """Position of each sentence's first token in ``input_ids``."""


@dataclass(frozen=True, slots=True)
class Abstract:
    """A document to be told in the model's words."""

    document: str


@dataclass(frozen=True, slots=True)
class Extract:
    """A document to pick sentences from."""

    windows: tuple[Window, ...]
    sentences: int


Plan = tuple[Abstract | Extract, ...]


class ProseTranscript:
    """Tells what an uncased model writes, as prose."""

    def __init__(self, model: Model, document: str) -> None:
        self._plain = PlainTranscript(model.tokenizer)
        self._restorer = Restorer(document)
        self._text = ""
        self._told = 0

    def read(self, token: int) -> str:
        """See ``Transcript``."""
        self._text += self._plain.read(token)
        certain = self._restorer.certain(self._text)
        piece = certain[self._told :]
        self._told = max(self._told, len(certain))
        return piece


class Summarize(Task[SummarizeRequest, Plan]):
    """A prefix LM that writes summaries and scores sentences (Dong et al. 2019; Liu and Lapata 2019)."""

    name = "summarize"
    summary = "Summarise a document"
    request = SummarizeRequest
    result = WrittenText
    example: ClassVar[Mapping[str, Any]] = {
        "input": "The bridge closed on Monday. Engineers had found cracks in two of its piers. "
        "Repairs will take a month. Until then a ferry carries people across.",
        "max_tokens": 40,
    }

    def check(self, manifest: Manifest) -> None:
        check_writer(manifest)
        if manifest.config.extract_head:
            frame(manifest)

    def encode(self, request: SummarizeRequest, model: Model, request_id: str) -> Encoded[Plan]:
        if request.mode == "abstractive":
            texts = [encode_text(model, text, param="input", truncate=request.truncate) for text in request.input]
            chosen = {"max_tokens": request.max_tokens, "beams": request.beams}
            writes = tuple(WriteItem(request_id, ids, sampling(model, len(ids), **chosen)) for ids in texts)
            return Encoded(writes, tuple(Abstract(text) for text in request.input))
        if not model.manifest.config.extract_head:
            raise InvalidValue("mode", f"the model {model.name} does not pick sentences")
        sentences = request.sentences or DEFAULT_SENTENCES
        plan = tuple(
            Extract(tuple(split_document(model, text, request.truncate)), sentences) for text in request.input
        )
        return Encoded(
            tuple(ExtractItem(request_id, window.input_ids) for part in plan for window in part.windows), plan
        )

    def transcript(self, plan: Plan, model: Model, number: int) -> Transcript | None:
        part = plan[number]
        if isinstance(part, Extract):
            return None
        return ProseTranscript(model, part.document) if model.uncased else PlainTranscript(model.tokenizer)

    def decode(self, plan: Plan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        remaining = iter(outputs)
        results: list[BaseModel] = []
        for part in plan:
            if isinstance(part, Extract):
                text = pick_sentences(part, [scored(next(remaining)) for _ in part.windows])
                results.append(WrittenText(text=text, finish_reason="stop"))
                continue
            output = written(next(remaining))
            text = model.tokenizer.decode(output.output_ids)
            if model.uncased:
                text = Restorer(part.document).restore(text)
            results.append(WrittenText(text=text, finish_reason=output.finish_reason))
        return results


def split_document(model: Model, document: str, truncate: bool = False) -> Iterator[Window]:
    """Cut a document at sentence borders into sequences that the model can read.

    A sentence is scored at its first token, so one too long for any window may lose its end. Raises
    ``TooManyTokens`` unless ``truncate``, and ``InvalidValue`` for a document without a single token.
    """
    room = model.manifest.max_input_tokens - len(frame(model.manifest))
    sentences: list[tuple[str, list[int]]] = []
    total = 0
    for start, end in split_sentences(document):
        ids = model.tokenizer.encode(document[start:end], add_special_tokens=False).ids
        total += len(ids)
        if ids:
            sentences.append((document[start:end], ids[:room]))
        if truncate and total >= MAX_DOCUMENT_TOKENS:
            break
    if not sentences:
        raise unreadable("input")
    refuse_longer(total, MAX_DOCUMENT_TOKENS, param="input", truncate=truncate)
    together: list[tuple[str, list[int]]] = []
    taken = 0
    for sentence, ids in sentences:
        if taken + len(ids) > room:
            yield _window(model, together)
            together, taken = [], 0
        together.append((sentence, ids))
        taken += len(ids)
    yield _window(model, together)


def _window(model: Model, sentences: Sequence[tuple[str, list[int]]]) -> Window:
    cls, sep = frame(model.manifest)
    input_ids, starts = [cls], []
    for _, ids in sentences:
        starts.append(len(input_ids))
        input_ids += ids
    return Window((*input_ids, sep), tuple(sentence for sentence, _ in sentences), tuple(starts))


def pick_sentences(part: Extract, logits: Sequence[NDArray[np.float32]]) -> str:
    """The best sentences by the ``(tokens,)`` logits of each window, in the order of the document."""
    sentences = [sentence for window in part.windows for sentence in window.sentences]
    scores = [
        float(window_logits[start])
        for window, window_logits in zip(part.windows, logits, strict=True)
        for start in window.starts
    ]
    best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: part.sentences]
    return " ".join(sentences[number] for number in sorted(best))
