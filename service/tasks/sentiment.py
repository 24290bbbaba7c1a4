"""Sentiment: is a text positive, neutral or negative?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from models.manifest import ArtefactError, Manifest
from service.engine.types import EncodeItem, Output
from service.models import Model
from service.tasks.base import Encoded, Task, TextRequest, encode_text, scored

LABELS = {"positive", "neutral", "negative"}


class SentimentRequest(TextRequest):
    """Texts to judge."""


class Scores(BaseModel):
    """Probabilities; they sum to 1."""

    positive: float
    neutral: float
    negative: float


class SentimentResult(BaseModel):
    """The judgement of one text."""

    label: str = Field(description="The likeliest of `positive`, `neutral` and `negative`.")
    score: float = Field(description="Its probability.")
    scores: Scores


class Sentiment(Task[SentimentRequest, None]):
    """A classifier over whole texts."""

    name = "sentiment"
    summary = "Judge whether a text is positive, neutral or negative"
    request = SentimentRequest
    result = SentimentResult
    says = "label"
    example: ClassVar[Mapping[str, Any]] = {"input": ["The food was wonderful.", "We waited an hour for a cold soup."]}

    def check(self, manifest: Manifest) -> None:
        if manifest.config.head != "classify" or set(manifest.labels) != LABELS:
            raise ArtefactError(f"manifest.json: sentiment needs a classify head with labels {sorted(LABELS)}")

    def encode(self, request: SentimentRequest, model: Model, request_id: str) -> Encoded[None]:
        texts = (encode_text(model, text, param="input", truncate=request.truncate) for text in request.input)
        return Encoded(tuple(EncodeItem(request_id, ids) for ids in texts), None)

    def decode(self, plan: None, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        results: list[BaseModel] = []
        for output in outputs:
            # Of three numbers, an array takes five times as long.
            logits = scored(output).tolist()
            highest = max(logits)
            likelihoods = [math.exp(logit - highest) for logit in logits]
            whole = sum(likelihoods)
            scores = {
                label: likelihood / whole for label, likelihood in zip(model.manifest.labels, likelihoods, strict=True)
            }
            label = max(scores, key=lambda name: scores[name])
            results.append(SentimentResult(label=label, score=scores[label], scores=Scores(**scores)))
        return results
