"""Logs hold no texts, unless they are asked to."""

import json
import logging

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.fakes import build

SECRET = "zebra"
BODIES = {
    "sentiment": {"input": f"good {SECRET}"},
    "translate": {"input": [f"good {SECRET}", "bad"]},
    "generate": {"input": SECRET, "stream": True},
    "answer": {"question": f"what {SECRET}", "context": f"paris {SECRET}"},
    "summarize": {"input": f"good {SECRET}"},
}


def ask_everything(settings: Settings) -> None:
    with TestClient(create_app(settings, build)) as client:
        for task, body in BODIES.items():
            assert client.post(f"/v1/{task}", json=body).status_code == 200
            assert client.post(f"/v1/{task}", json={**body, "model": SECRET}).status_code == 404
            assert client.post(f"/v1/{task}", json={**body, "beams": SECRET, "colour": SECRET}).status_code == 422
            assert client.post(f"/v1/{task}", content=json.dumps(body)).status_code == 400
        client.app.state.service.engine.failure = RuntimeError("broken")
        for task, body in BODIES.items():
            assert client.post(f"/v1/{task}", json=body).status_code in (200, 500)


def test_no_text_is_logged(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ask_everything(settings)
    assert "broken" in caplog.text
    assert SECRET not in caplog.text


def test_texts_are_logged_where_they_are_wanted(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="wattle.texts")
    ask_everything(settings.model_copy(update={"log_texts": True}))
    lines = [json.loads(record.message) for record in caplog.records if record.name == "wattle.texts"]
    asked = {line["request_id"]: line for line in lines if "request" in line}
    answered = {line["request_id"]: line["results"] for line in lines if "results" in line}
    assert {line["task"] for line in asked.values()} == set(BODIES)
    assert len(answered) == len(BODIES)
    assert set(answered) < set(asked)
    (translation,) = [name for name in answered if asked[name]["task"] == "translate"]
    assert asked[translation]["request"]["input"] == BODIES["translate"]["input"]
    assert [result["text"] for result in answered[translation]] == BODIES["translate"]["input"]
