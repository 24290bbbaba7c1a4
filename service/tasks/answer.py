"""Question answering: the span of a context that answers a question, or none."""

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from models.manifest import ArtefactError, Manifest
from service.engine.types import EncodeItem, Output
from service.errors import InvalidValue
from service.models import Model
from service.tasks.base import (
    MAX_DOCUMENT_TOKENS,
    Encoded,
    Task,
    TaskRequest,
    Texts,
    frame,
    refuse_longer,
    scored,
    unreadable,
)

STRIDE = 128
"""Context tokens that neighbouring windows share."""
MAX_ANSWER_TOKENS = 30


class AnswerRequest(TaskRequest):
    """Questions, each with the context to look for its answer in."""

    question: Texts = Field(description="A question, or a list of them; `truncate` cuts it.")
    context: Texts = Field(description="The question's context, however long, or one for each question.")
    abstain: bool = Field(True, description="Say that there is no answer where that is likelier than any span.")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.question) != len(self.context):
            raise InvalidValue("context", "there must be as many as questions")
        return self


class AnswerResult(BaseModel):
    """The answer to one question."""

    answer: str = Field(description="The span of the context, letter by letter; empty where the model abstained.")
    score: float = Field(
        description="Probability of this outcome among all spans and 'no answer': a softmax over their scores."
    )
    start: int | None = Field(description="Where the span starts in the context, in characters (code points).")
    end: int | None = Field(description="Where it ends, exclusively.")
    abstained: bool = Field(description="Whether the model found no answer in the context.")


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a context as one sequence for the model."""

    first: int
    """Number of its first token in the context."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A question and its context, tokenised and cut into windows."""

    context: str
    offsets: Sequence[tuple[int, int]]
    """Characters of each token of the context."""
    context_starts: int
    """Position of the context's first token in every window."""
    windows: tuple[Window, ...]
    may_abstain: bool = True


class Answer(Task[AnswerRequest, tuple[Reading, ...]]):
    """A span extractor that may abstain (Devlin et al. 2018, section 4.3)."""

    name = "answer"
    summary = "Answer a question from a context"
    request = AnswerRequest
    result = AnswerResult
    texts = "question"
    says = "answer"
    example: ClassVar[Mapping[str, Any]] = {
        "question": "Where does the river rise?",
        "context": "The Danube rises in the Black Forest and flows into the Black Sea.",
    }

    def check(self, manifest: Manifest) -> None:
        if manifest.config.head != "span":
            raise ArtefactError("manifest.json: answer needs a span head")
        frame(manifest)

    def encode(self, request: AnswerRequest, model: Model, request_id: str) -> Encoded[tuple[Reading, ...]]:
        cls, sep = frame(model.manifest)
        items: list[EncodeItem] = []
        readings = []
        for question, context in zip(request.question, request.context, strict=True):
            head = (cls, *_question_ids(model, question, request.truncate), sep)
            encoding = model.tokenizer.encode(context, add_special_tokens=False)
            if not encoding.ids:
                raise unreadable("context")
            refuse_longer(len(encoding.ids), MAX_DOCUMENT_TOKENS, param="context", truncate=request.truncate)
            encoding.truncate(MAX_DOCUMENT_TOKENS)
            room = model.manifest.max_input_tokens - len(head) - 1
            windows = tuple(split_windows(len(encoding.ids), room))
            for window in windows:
                tail = [*encoding.ids[window.first : window.first + window.tokens], sep]
                types = (0,) * len(head) + (1,) * len(tail) if model.manifest.config.n_token_types else ()
                items.append(EncodeItem(request_id, (*head, *tail), types))
            readings.append(Reading(context, encoding.offsets, len(head), windows, request.abstain))
        return Encoded(tuple(items), tuple(readings))

    def decode(self, plan: tuple[Reading, ...], model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        logits = iter(outputs)
        threshold = model.manifest.no_answer_threshold or 0.0
        return [
            read_answer(
                reading,
                [scored(next(logits)) for _ in reading.windows],
                threshold if reading.may_abstain else math.inf,
            )
            for reading in plan
        ]


def split_windows(tokens: int, room: int) -> Iterator[Window]:
    """Cover ``tokens`` of context by windows of ``room``, of which neighbours share ``STRIDE`` (at most half)."""
    step = room - min(STRIDE, room // 2)
    first = 0
    while first + room < tokens:
        yield Window(first, room)
        first += step
    yield Window(first, tokens - first)


def read_answer(reading: Reading, logits: Sequence[NDArray[np.float32]], threshold: float) -> AnswerResult:
    """The best span over all windows, each with ``(tokens, 2)`` logits for start and end.

    A span's score is its start's logit and its end's; 'no answer' scores the sum at the first token, the least of
    any window, since one window with an answer is enough. Raises nothing: any logits give a result.
    """
    # spans[i, d] is the score of the span from context token i to i + d, the best of the windows that hold it.
    spans = np.full((len(reading.offsets), MAX_ANSWER_TOKENS), -np.inf)
    null = np.inf
    for window, scores in zip(reading.windows, logits, strict=True):
        null = min(null, float(scores[0, 0]) + float(scores[0, 1]))
        here = scores[reading.context_starts : reading.context_starts + window.tokens].astype(np.float64)
        for length in range(min(MAX_ANSWER_TOKENS, window.tokens)):
            rows = window.tokens - length
            column = spans[window.first : window.first + rows, length]
            np.maximum(column, here[:rows, 0] + here[length:, 1], out=column)
    first, length = divmod(int(spans.argmax()), MAX_ANSWER_TOKENS)
    best = float(spans[first, length])
    top = max(best, null)
    total = float(np.exp(spans - top).sum() + np.exp(null - top))
    if null - best > threshold:
        return AnswerResult(answer="", score=float(np.exp(null - top)) / total, start=None, end=None, abstained=True)
    start, end = _whole_characters(reading.context, reading.offsets[first][0], reading.offsets[first + length][1])
    score = float(np.exp(best - top)) / total
    return AnswerResult(answer=reading.context[start:end], score=score, start=start, end=end, abstained=False)


def _question_ids(model: Model, question: str, truncate: bool) -> tuple[int, ...]:
    """A question's token ids; with its special tokens it may take half of what the model reads."""
    ids = model.tokenizer.encode(question, add_special_tokens=False).ids
    if not ids:
        raise unreadable("question")
    allowed = model.manifest.max_input_tokens // 2 - 2
    refuse_longer(len(ids), allowed, param="question", truncate=truncate)
    return tuple(ids[:allowed])


def _whole_characters(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its edges, and with the marks that combine with its last letter."""
    while end < len(text) and (unicodedata.category(text[end])[0] == "M" or text[end] == "\u200d"):
        end += 1
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
