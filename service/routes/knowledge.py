"""Knowledge bases over HTTP: put documents in, look at them, search them, delete them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from service.core import Charge
from service.engine.types import EngineClosed, Overloaded
from service.errors import (
    BodyTooLarge,
    DailyBudgetSpent,
    DeadlineExceeded,
    DocumentNotFound,
    InvalidValue,
    KnowledgeBaseNotFound,
    KnowledgeUnavailable,
    MalformedBody,
    MissingParameter,
    TooManyAtOnce,
    UnknownParameter,
    documented,
    is_foreseen,
    render,
)
from service.knowledge.bases import Description, Retrieval
from service.knowledge.documents import MEDIA_TYPES, read_documents
from service.knowledge.ingest import Progress
from service.responses import JsonResponse
from service.routes.common import Energy, energy_headers, energy_of, service_of, unless_gone
from service.routes.sse import CLIENT_GONE
from service.tasks.answer import FoundPassage

NDJSON = "application/x-ndjson"
_EXAMPLE = [{"id": "danube", "text": "The Danube rises in the Black Forest.", "metadata": {"title": "The Danube"}}]
_BASE_ERRORS = (KnowledgeBaseNotFound, KnowledgeUnavailable)
_WORK_ERRORS = (
    DailyBudgetSpent,
    MalformedBody,
    BodyTooLarge,
    InvalidValue,
    TooManyAtOnce,
    Overloaded,
    EngineClosed,
    KnowledgeUnavailable,
    DeadlineExceeded,
)
_log = logging.getLogger(__name__)


class KnowledgeBase(BaseModel):
    """A knowledge base in figures."""

    name: str
    documents: int
    passages: int = Field(description="Overlapping runs of sentences into which the documents were cut.")
    retrieval: Retrieval = Field(
        description="`bm25`: by words; `bm25+dense`: by words and by the embedding model's vectors, ranks fused."
    )
    embedding_model: str | None
    size_bytes: int
    created_at: datetime


class KnowledgeBases(BaseModel):
    """All of them."""

    knowledge_bases: list[KnowledgeBase]


class DocumentLine(BaseModel):
    """A document in a list."""

    id: str
    characters: int
    passages: int


class DocumentList(BaseModel):
    """Documents in the order of their ids."""

    documents: list[DocumentLine]
    next: str | None = Field(description="The value of `after` that continues the list; null at its end.")


class StoredDocument(BaseModel):
    """A document as it was put."""

    id: str
    text: str
    metadata: dict[str, Any]


class Deleted(BaseModel):
    """What is no more."""

    deleted: str


class SearchRequest(BaseModel):
    """What to look for."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    query: str = Field(min_length=1, description="A question, or words.")
    passages: int = Field(default=5, ge=1, le=100, description="How many passages are wanted.")
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that the search may take; the service's own limit holds too.",
    )


class SearchResponse(BaseModel):
    """The passages that bear most on a query."""

    id: str = Field(description="Names the request in the ledger.")
    passages: list[FoundPassage] = Field(description="Best first.")
    energy: Energy


class IngestLine(BaseModel):
    """One line of the answer to documents: how far they have come."""

    documents: int = Field(description="Stored, whole and for good.")
    of: int = Field(description="Documents in the request.")
    passages: int = Field(description="Into which they were cut; embedded too, where an embedding model is loaded.")
    replaced: int = Field(description="Documents that took the place of one with the same id.")


class IngestResult(IngestLine):
    """The last line."""

    id: str = Field(description="Names the request in the ledger.")
    knowledge_base: str
    energy: Energy


def knowledge_routes() -> APIRouter:
    """The bases, their documents, and search."""
    router = APIRouter(prefix="/v1/knowledge", tags=["knowledge"])

    @router.get(
        "",
        operation_id="knowledge_bases",
        summary="List the knowledge bases",
        response_model=KnowledgeBases,
        responses=documented(),
    )
    async def bases(http: Request) -> Response:
        found = await asyncio.to_thread(service_of(http).knowledge.describe_all)
        return JsonResponse(KnowledgeBases(knowledge_bases=[_show(each) for each in found]).model_dump())

    @router.get(
        "/{name}",
        operation_id="knowledge_base",
        summary="Describe a knowledge base",
        response_model=KnowledgeBase,
        responses=documented(*_BASE_ERRORS),
    )
    async def base(name: str, http: Request) -> Response:
        found = await asyncio.to_thread(service_of(http).knowledge.describe, name)
        return JsonResponse(_show(found).model_dump())

    @router.delete(
        "/{name}",
        operation_id="delete_knowledge_base",
        summary="Delete a knowledge base with all its documents",
        response_model=Deleted,
        responses=documented(*_BASE_ERRORS),
    )
    async def delete(name: str, http: Request) -> Response:
        await asyncio.to_thread(service_of(http).knowledge.delete, name)
        return JsonResponse(Deleted(deleted=name).model_dump())

    @router.put(
        "/{name}/documents",
        operation_id="put_documents",
        summary="Put documents into a knowledge base, which is made where there is none",
        response_class=StreamingResponse,
        responses={
            200: {"description": "A line of JSON per step of progress; the last has the bill, or an error."},
            **documented(*_WORK_ERRORS),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {kind: {"schema": {"type": "string"}} for kind in MEDIA_TYPES}
                | {MEDIA_TYPES[0]: {"schema": {"type": "array", "items": {"type": "object"}}, "example": _EXAMPLE}},
            }
        },
    )
    async def put(
        name: str,
        http: Request,
        id: Annotated[str | None, Query(description="Of a document in Markdown or plain text.")] = None,
    ) -> Response:
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        documents = await asyncio.to_thread(read_documents, await http.body(), media_type, id)
        steps = service_of(http).ingest(name, documents, http.state.request_id)
        # What goes wrong before anything is stored still has a status of its own.
        first = await anext(steps)
        return StreamingResponse(_lines(name, first, steps), media_type=NDJSON)

    @router.get(
        "/{name}/documents",
        operation_id="documents",
        summary="List the documents of a knowledge base",
        response_model=DocumentList,
        responses=documented(InvalidValue, *_BASE_ERRORS),
    )
    async def documents(
        name: str,
        http: Request,
        after: Annotated[str, Query(description="List from behind this id.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="How many at most.")] = 100,
    ) -> Response:
        found = await asyncio.to_thread(service_of(http).knowledge.documents, name, after, limit + 1)
        page = [DocumentLine(**asdict(each)) for each in found[:limit]]
        more = page[-1].id if len(found) > limit else None
        return JsonResponse(DocumentList(documents=page, next=more).model_dump())

    @router.get(
        "/{name}/documents/{id:path}",
        operation_id="document",
        summary="A document as it was put",
        response_model=StoredDocument,
        responses=documented(DocumentNotFound, *_BASE_ERRORS),
    )
    async def document(name: str, id: str, http: Request) -> Response:
        found = await asyncio.to_thread(service_of(http).knowledge.document, name, id)
        return JsonResponse(StoredDocument(id=found.id, text=found.text, metadata=dict(found.metadata)).model_dump())

    @router.delete(
        "/{name}/documents/{id:path}",
        operation_id="delete_document",
        summary="Delete a document",
        response_model=Deleted,
        responses=documented(DocumentNotFound, *_BASE_ERRORS),
    )
    async def delete_document(name: str, id: str, http: Request) -> Response:
        await asyncio.to_thread(service_of(http).knowledge.delete_document, name, id)
        return JsonResponse(Deleted(deleted=id).model_dump())

    @router.post(
        "/{name}/search",
        operation_id="search",
        summary="Search a knowledge base for passages",
        response_model=SearchResponse,
        responses=documented(*_WORK_ERRORS, *_BASE_ERRORS, MissingParameter, UnknownParameter),
        openapi_extra={
            "requestBody": {"content": {"application/json": {"example": {"query": "Where does the Danube rise?"}}}}
        },
    )
    async def search(name: str, body: SearchRequest, http: Request) -> Response:
        work = service_of(http).search(name, body.query, body.passages, http.state.request_id, body.timeout_s)
        done = await unless_gone(http.receive, work)
        if done is None:
            return Response(status_code=CLIENT_GONE)
        charge, found = done
        passages = [FoundPassage(**asdict(each)) for each in found]
        answer = SearchResponse(id=charge.request_id, passages=passages, energy=energy_of(charge.bill))
        return JsonResponse(answer.model_dump(), headers=energy_headers(charge.bill))

    return router


async def _lines(
    name: str, first: Progress | Charge, steps: AsyncGenerator[Progress | Charge]
) -> AsyncIterator[bytes]:
    """Progress as lines of JSON. An error in the middle, when the status is long sent, is the last line."""
    async with aclosing(steps):
        step = first
        try:
            while True:
                if isinstance(step, Progress):
                    progress = step
                    line = IngestLine(**asdict(progress)).model_dump()
                else:
                    line = IngestResult(
                        **asdict(progress),
                        id=step.request_id,
                        knowledge_base=name,
                        energy=energy_of(step.bill),
                    ).model_dump()
                yield orjson.dumps(line) + b"\n"
                step = await anext(steps)
        except StopAsyncIteration:
            return
        except Exception as error:
            if not is_foreseen(error):
                _log.exception("documents for %s failed", name)
            yield bytes(render(error).body) + b"\n"


def _show(base: Description) -> KnowledgeBase:
    figures = asdict(base)
    created_s = figures.pop("created_s")
    return KnowledgeBase(**figures, created_at=datetime.fromtimestamp(created_s, UTC))
