"""Too many requests are told so before anything is read of them, and others go on."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.testclient import TestClient

from service.app import create_app
from service.engine.types import EngineClosed
from service.settings import Settings
from tests.service.fakes import build, wait_until
from tests.service.test_edge import call


def test_requests_beyond_the_limit_are_refused_unread(settings: Settings) -> None:
    narrow = settings.model_copy(update={"max_concurrent_requests": 2, "max_client_batch_size": 2})
    with TestClient(create_app(narrow, build)) as client, ThreadPoolExecutor() as threads:
        engine = client.app.state.service.engine
        engine.holds = True
        held = [threads.submit(client.post, "/v1/sentiment", json={"input": "good"}) for _ in range(2)]
        wait_until(lambda: len(engine.tickets) == 2)
        refused: list[dict[str, Any]] = asyncio.run(call(client.app, body=b"no JSON"))
        assert refused[0]["status"] == 429
        headers = dict(refused[0]["headers"])
        assert int(headers[b"retry-after"]) >= 1
        assert headers[b"x-request-id"].startswith(b"req-")
        assert client.get("/readyz").status_code == 200
        for ticket in engine.tickets:
            ticket.future.set_exception(EngineClosed("over"))
        assert [each.result().status_code for each in held] == [503, 503]
        assert client.post("/v1/sentiment", content="no JSON").status_code == 400
