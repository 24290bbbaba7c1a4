"""Embeddings, by models that end in a vector: none of the starters does."""

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service.conversation import request_of
from service.core import Receipt
from service.routes.common import Energy, energy_of
from service.routes.openai.common import ERRORS, Lenient, example
from service.routes.sse import respond_whole
from service.tasks.embed import Embed, Embedding

EMBED = Embed()


class EmbeddingsRequest(Lenient):
    """Texts to embed."""

    input: Any = Field(description="A text, or a list of them; token ids are those of other models.")
    model: str | None = Field(None, description="Name or alias of a model that embeds; else the first one.")
    dimensions: int | None = Field(None, description="Keep this many of a vector's numbers, the first.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64` is of 32-bit floats, the least significant byte first."
    )
    truncate: bool = Field(False, description="Cut a text that is too long instead of refusing it.")
    energy_budget_j: float | None = Field(None, description="Most joules that the request may cost.")


class EmbeddingObject(BaseModel):
    """The vector of one text; its length is 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """Tokens and energy of a request."""

    prompt_tokens: int
    total_tokens: int
    energy: Energy


class EmbeddingsResponse(BaseModel):
    """The vectors, in the order of the texts."""

    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingsUsage


def add_embeddings(router: APIRouter) -> None:
    """Add the route."""

    @router.post(
        "/embeddings",
        operation_id="embeddings",
        summary="OpenAI: embed texts",
        response_model=EmbeddingsResponse,
        responses=ERRORS,
        openapi_extra=example({"input": ["A dog runs along the beach.", "Ein Hund rennt."]}),
    )
    async def embed(body: EmbeddingsRequest, http: Request) -> Response:
        asked = body.model_dump(include={"input", "model", "dimensions", "truncate", "energy_budget_j"})
        return await respond_whole(http, EMBED, request_of(EMBED, asked), lambda receipt: _tell(receipt, body), {})


def _tell(receipt: Receipt, body: EmbeddingsRequest) -> dict[str, Any]:
    vectors = [result.vector for result in receipt.results if isinstance(result, Embedding)]
    as_text = body.encoding_format == "base64"
    usage = EmbeddingsUsage(
        prompt_tokens=receipt.input_tokens, total_tokens=receipt.input_tokens, energy=energy_of(receipt.bill)
    )
    # The rest of ``EmbeddingsResponse`` would be made of each number.
    data = [
        {"object": "embedding", "index": number, "embedding": _base64(vector) if as_text else vector}
        for number, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": receipt.model.name, "usage": usage.model_dump()}


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()
