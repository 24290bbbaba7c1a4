"""OpenAI's dialect: what its clients call with a base URL that ends in ``/v1``."""

from fastapi import APIRouter

from service.routes.lean import JsonRoute
from service.routes.openai.chat import add_chat
from service.routes.openai.completions import add_completions
from service.routes.openai.embeddings import add_embeddings
from service.routes.openai.models import add_models
from service.routes.openai.responses import add_responses


def openai_routes() -> APIRouter:
    """All of them."""
    router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)
    for add in (add_chat, add_completions, add_responses, add_embeddings, add_models):
        add(router)
    return router
