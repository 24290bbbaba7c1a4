"""The short way answers as FastAPI's own does, letter by letter."""

from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.testclient import TestClient

from service.errors import WattleError, render
from service.responses import JsonResponse
from service.routes.lean import JsonRoute, Shortcut
from service.tasks import TASKS


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    text: str
    number: float | None = None


async def echo(body: Body, http: Request) -> Response:
    return JsonResponse({"body": body.model_dump(), "path": http.url.path})


async def of_a_path(place: int, body: Body, http: Request) -> Response:
    return JsonResponse({"place": place, "body": body.model_dump()})


def served(route_class: type[APIRoute]) -> FastAPI:
    async def answer(request: Request, error: Exception) -> Response:
        return render(error)

    kinds = (WattleError, RequestValidationError, HTTPException)
    app = FastAPI(exception_handlers=dict.fromkeys(kinds, answer), redirect_slashes=False)
    app.router.route_class = route_class
    app.post("/echo")(echo)
    app.post("/places/{place}")(of_a_path)
    return app


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "good", "number": 1}',
        '{"text": "gut"}'.encode("utf-16"),
        b'{"text": "half \\ud800 a pair"}',
        b'{"text": "good", "number": NaN}',
        b'{"text": "good", "text": "better"}',
        b'{"text": 1}',
        b'{"text": "good", "number": "1"}',
        b'{"text": "good", "colour": "red"}',
        b"{}",
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b"9" * 10_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content)[:40],
)
@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/problem+json",
        "text/plain",
        "json",
        ";",
        None,
    ],
)
def test_a_body_ends_in_the_same_answer(content: bytes, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    ours, theirs = (TestClient(served(kind)) for kind in (JsonRoute, APIRoute))
    for path in ("/echo", "/places/3", "/places/x"):
        mine, other = (each.post(path, content=content, headers=headers) for each in (ours, theirs))
        assert (mine.status_code, mine.content, mine.headers) == (other.status_code, other.content, other.headers)


def test_another_method_is_told_which_is_right() -> None:
    ours, theirs = (TestClient(served(kind)).get("/echo") for kind in (JsonRoute, APIRoute))
    assert (ours.status_code, ours.content, ours.headers) == (theirs.status_code, theirs.content, theirs.headers)


def test_both_are_described_alike() -> None:
    assert served(JsonRoute).openapi() == served(APIRoute).openapi()


def test_only_what_has_a_body_alone_takes_the_short_way() -> None:
    routes = [route for route in served(JsonRoute).routes if isinstance(route, JsonRoute)]
    assert {route.path: route.is_lean for route in routes} == {"/echo": True, "/places/{place}": False}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_takes_it(app: FastAPI, task: Any) -> None:
    (shortcut,) = [each for each in app.user_middleware if each.cls is Shortcut]
    assert f"/v1/{task.name}" in {
        route.path for route in shortcut.kwargs["routes"] if isinstance(route, JsonRoute) and route.is_lean
    }
