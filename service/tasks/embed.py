"""Embedding: a vector for each text, near the vectors of texts that say the same. Asked for in dialects only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from models.manifest import Manifest
from service.engine.types import EncodeItem, Output
from service.errors import InvalidValue, ModelNotFound
from service.models import Model, Models
from service.tasks.base import Encoded, Task, TextRequest, encode_text, scored

MAX_TEXTS = 2048
"""In one request, as OpenAI has it: whoever fills an index sends hundreds."""
_LETTERS_A_VECTOR = 100
"""As many letters take as long to read as a vector takes to be told."""


class EmbedRequest(TextRequest):
    """Texts to embed."""

    dimensions: int | None = Field(None, ge=1, description="Keep this many of the vector's numbers, the first.")


class Embedding(BaseModel):
    """The vector of one text, of length 1."""

    vector: list[float]


@dataclass(frozen=True, slots=True)
class EmbedPlan:
    """What decoding needs to know of a request."""

    dimensions: int | None


class Embed(Task[EmbedRequest, EmbedPlan]):
    """An encoder that ends in a vector. Such a model has no other task, and names none."""

    name = "embed"
    summary = "Embed a text"
    request = EmbedRequest
    result = Embedding
    says = "vector"
    most_texts = MAX_TEXTS
    in_groups = True
    example: ClassVar[Mapping[str, Any]] = {"input": ["A dog runs along the beach."]}

    def check(self, manifest: Manifest) -> None:
        """Nothing to add to what every manifest is checked for."""

    def letters(self, request: EmbedRequest) -> int:
        return super().letters(request) + _LETTERS_A_VECTOR * len(request.input)

    def choose(self, request: EmbedRequest, models: Models) -> Model:
        if request.model is None:
            model = next(filter(embeds, models.served.values()), None)
            if model is None:
                raise ModelNotFound(None, [], self.name)
            return model
        model = models.named(request.model)
        if not embeds(model):
            raise InvalidValue("model", f"the model {model.name} makes no embeddings")
        return model

    def encode(self, request: EmbedRequest, model: Model, request_id: str) -> Encoded[EmbedPlan]:
        width = model.manifest.config.d_model
        if request.dimensions is not None and request.dimensions > width:
            raise InvalidValue("dimensions", f"the model's vectors have {width}")
        texts = (encode_text(model, text, param="input", truncate=request.truncate) for text in request.input)
        return Encoded(tuple(EncodeItem(request_id, ids) for ids in texts), EmbedPlan(request.dimensions))

    def decode(self, plan: EmbedPlan, model: Model, outputs: Sequence[Output]) -> list[BaseModel]:
        results: list[BaseModel] = []
        for output in outputs:
            vector = scored(output)[: plan.dimensions].astype(np.float64)
            # Of length 1, as those who compare by the dot product expect; a vector of zeros has no direction.
            length = float(np.linalg.norm(vector)) or 1.0
            results.append(Embedding(vector=(vector / length).tolist()))
        return results


def embeds(model: Model) -> bool:
    """Whether the model ends in a vector."""
    return not model.manifest.tasks
