"""Question answering: the span of a context, or of the passages of a knowledge base, that answers a question, or none.

Knows nothing of how passages are found.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PrivateAttr, model_validator

from models.manifest import ArtefactError, Confidence, Manifest
from service.engine.types import EncodeItem, Output
from service.errors import InvalidValue, MissingParameter
from service.knowledge.store import Passage
from service.models import Model
from service.tasks.base import (
    MAX_DOCUMENT_TOKENS,
    Encoded,
    Lookup,
    Task,
    TaskRequest,
    Texts,
    frame,
    refuse_longer,
    scored,
    unreadable,
)
from service.tasks.spans import MAX_ANSWER_TOKENS, Reading, score_spans, share, split_windows

RANK_WEIGHT = 2.0
"""How much the rank of a passage counts beside the logits of its spans. First chosen on 1,400 SQuAD questions, some of
them among those that are scored, then looked at again on those on which confidence is fitted: of five passages, the F1
of questions with an answer was 63.8 at 0, 67.5 at 1, 67.9 at 2 and 68.4 at 3, while right answers were told from wrong
ones best at 2 (area under the ROC curve 0.721, 0.736, 0.738, 0.736)."""


class AnswerRequest(TaskRequest):
    """Questions, each with the context to look for its answer in, or all with a knowledge base."""

    question: Texts = Field(description="A question, or a list of them; `truncate` cuts it.")
    context: Texts | None = Field(
        default=None, description="The question's context, however long, or one for each question."
    )
    knowledge_base: str | None = Field(
        None, description="Name of the knowledge base to look in, instead of a context."
    )
    passages: int = Field(5, ge=1, le=20, description="How many passages of the knowledge base are read.")
    abstain: bool = Field(True, description="Say that there is no answer where that is likelier than any span.")

    _found: tuple[tuple[Passage, ...], ...] = PrivateAttr(())
    """The passages that the knowledge base had for each question, once it has been asked."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.context is None and self.knowledge_base is None:
            raise MissingParameter("context", "this parameter is required, unless there is a knowledge_base")
        if self.context is not None and self.knowledge_base is not None:
            raise InvalidValue("knowledge_base", "goes without a context")
        if self.context is not None and len(self.question) != len(self.context):
            raise InvalidValue("context", "there must be as many as questions")
        return self


class FoundPassage(BaseModel):
    """A passage of a knowledge base."""

    document: str = Field(description="Id of its document.")
    start: int = Field(description="Where it starts in the document, in characters (code points).")
    end: int = Field(description="Where it ends, exclusively.")
    text: str
    metadata: dict[str, Any] = Field(description="The document's.")
    score: float = Field(description="How well it was found: the sum of 1 / (60 + rank) over the rankings.")


class AnswerResult(BaseModel):
    """The answer to one question."""

    answer: str = Field(description="The span of the context, letter by letter; empty where the model abstained.")
    score: float = Field(
        description="Probability of this outcome among all spans and 'no answer': a softmax over their scores."
    )
    start: int | None = Field(description="Where the span starts in the context or document, in characters.")
    end: int | None = Field(description="Where it ends, exclusively.")
    abstained: bool = Field(description="Whether the model found no answer.")
    confidence: float | None = Field(
        default=None,
        description="Calibrated probability that the answer, given or withheld, is right; null for a context.",
    )
    document: str | None = Field(default=None, description="Id of the document that holds the answer.")
    passages: list[FoundPassage] = Field(
        default=[], description="What was read of the knowledge base, best found first."
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and what is read for its answer: one context, or passages in the order in which they were found."""

    readings: tuple[Reading, ...]
    may_abstain: bool
    passages: tuple[Passage, ...] | None = None
    """One for each reading; None for a context."""


class Answer(Task[AnswerRequest, tuple[Asked, ...]]):
    """A span extractor that may abstain (Devlin et al. 2018, section 4.3)."""

    name = "answer"
    summary = "Answer a question from a context or a knowledge base"
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

    def lookup(self, request: AnswerRequest) -> Lookup | None:
        if request.knowledge_base is None:
            return None
        return Lookup(request.knowledge_base, request.question, request.passages)

    def ground(self, request: AnswerRequest, found: Sequence[Sequence[Passage]]) -> AnswerRequest:
        grounded = request.model_copy()
        grounded._found = tuple(map(tuple, found))
        return grounded

    def letters(self, request: AnswerRequest) -> int:
        read = request.context or [passage.text for found in request._found for passage in found]
        return super().letters(request) + sum(map(len, read))

    def encode(self, request: AnswerRequest, model: Model, request_id: str) -> Encoded[tuple[Asked, ...]]:
        items: list[EncodeItem] = []
        asked = []
        for number, question in enumerate(request.question):
            head = _head(model, question, request.truncate)
            if request.context is not None:
                reading = _read(model, request_id, head, request.context[number], request.truncate, items)
                if reading is None:
                    raise unreadable("context")
                asked.append(Asked((reading,), request.abstain))
                continue
            readings, passages = [], []
            for passage in request._found[number]:
                reading = _read(model, request_id, head, passage.text, True, items)
                if reading is not None:
                    readings.append(reading)
                    passages.append(passage)
            asked.append(Asked(tuple(readings), request.abstain, tuple(passages)))
        return Encoded(tuple(items), tuple(asked))

    def decode(self, plan: tuple[Asked, ...], model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        left = iter(outputs)
        threshold = model.manifest.no_answer_threshold or 0.0
        results: list[BaseModel] = []
        for asked in plan:
            logits = [[scored(next(left)) for _ in reading.windows] for reading in asked.readings]
            if asked.passages is None:
                lenience = threshold if asked.may_abstain else math.inf
                results.append(read_answer(asked.readings[0], logits[0], lenience))
            else:
                results.append(read_passages(asked, asked.passages, logits, threshold, model.manifest.confidence))
        return results


def read_answer(reading: Reading, logits: Sequence[NDArray[np.float32]], threshold: float) -> AnswerResult:
    """The best span over all windows, each with ``(tokens, 2)`` logits for start and end.

    A span's score is its start's logit and its end's; 'no answer' scores the sum at the first token, the least of
    any window, since one window with an answer is enough. Raises nothing: any logits give a result.
    """
    spans, null = score_spans(reading, logits)
    first, length = divmod(int(spans.argmax()), MAX_ANSWER_TOKENS)
    best = float(spans[first, length])
    if null - best > threshold:
        score = share(null, [spans], null)
        return AnswerResult(answer="", score=score, start=None, end=None, abstained=True)
    start, end = reading.characters(first, first + length)
    score = share(best, [spans], null)
    return AnswerResult(answer=reading.context[start:end], score=score, start=start, end=end, abstained=False)


def read_passages(
    asked: Asked,
    passages: Sequence[Passage],
    logits: Sequence[Sequence[NDArray[np.float32]]],
    threshold: float,
    calibrated: Confidence | None,
) -> AnswerResult:
    """The best span over all passages, or none.

    A reader trained on single passages is as sure of the best span of a wrong one, so scores of different passages
    are compared only after that of the passage at rank r is lowered by ``RANK_WEIGHT * log r``: what its rank says
    against it. Spans are not set against their own passage's 'no answer': measured, that told right answers from
    wrong ones less well. A calibrated model abstains where the answer is too unlikely to be right, any other where
    'no answer', the least of any passage, outscores the best span by more than ``threshold``.
    """
    shown = [FoundPassage(**asdict(passage)) for passage in passages]
    if not passages:
        return AnswerResult(
            answer="", score=1.0, start=None, end=None, abstained=True, confidence=None if calibrated is None else 0.0
        )
    scores, nulls = zip(*map(score_spans, asked.readings, logits), strict=True)
    scores = tuple(spans - RANK_WEIGHT * math.log(rank) for rank, spans in enumerate(scores, start=1))
    null = min(nulls)
    chosen = max(range(len(scores)), key=lambda place: float(scores[place].max()))
    first, length = divmod(int(scores[chosen].argmax()), MAX_ANSWER_TOKENS)
    best = float(scores[chosen][first, length])
    confidence, abstains = None, null - best > threshold
    if calibrated is not None:
        confidence = calibrated.of(best)
        abstains = confidence < calibrated.least
    if asked.may_abstain and abstains:
        score = share(null, scores, null)
        return AnswerResult(
            answer="", score=score, start=None, end=None, abstained=True, confidence=confidence, passages=shown
        )
    reading, passage = asked.readings[chosen], passages[chosen]
    start, end = reading.characters(first, first + length)
    return AnswerResult(
        answer=reading.context[start:end],
        score=share(best, scores, null),
        start=passage.start + start,
        end=passage.start + end,
        abstained=False,
        confidence=confidence,
        document=passage.document,
        passages=shown,
    )


def _head(model: Model, question: str, truncate: bool) -> tuple[int, ...]:
    """What stands before every window: the question between its special tokens."""
    cls, sep = frame(model.manifest)
    return (cls, *_question_ids(model, question, truncate), sep)


def _read(
    model: Model, request_id: str, head: tuple[int, ...], context: str, truncate: bool, items: list[EncodeItem]
) -> Reading | None:
    """Cut a context into windows, and add them to ``items``; None where the model can read none of it."""
    _, sep = frame(model.manifest)
    encoding = model.tokenizer.encode(context, add_special_tokens=False)
    if not encoding.ids:
        return None
    refuse_longer(len(encoding.ids), MAX_DOCUMENT_TOKENS, param="context", truncate=truncate)
    encoding.truncate(MAX_DOCUMENT_TOKENS)
    room = model.manifest.max_input_tokens - len(head) - 1
    windows = tuple(split_windows(len(encoding.ids), room))
    for window in windows:
        tail = [*encoding.ids[window.first : window.first + window.tokens], sep]
        types = (0,) * len(head) + (1,) * len(tail) if model.manifest.config.n_token_types else ()
        items.append(EncodeItem(request_id, (*head, *tail), types))
    return Reading(context, encoding.offsets, len(head), windows)


def _question_ids(model: Model, question: str, truncate: bool) -> tuple[int, ...]:
    """A question's token ids; with its special tokens it may take half of what the model reads."""
    ids = model.tokenizer.encode(question, add_special_tokens=False).ids
    if not ids:
        raise unreadable("question")
    allowed = model.manifest.max_input_tokens // 2 - 2
    refuse_longer(len(ids), allowed, param="question", truncate=truncate)
    return tuple(ids[:allowed])
