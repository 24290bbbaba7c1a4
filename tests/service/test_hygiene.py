"""Whatever text comes, there is an answer or a clear refusal, and never a failure of the service."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.tasks import TASKS
from service.tasks.base import Task

AWKWARD = st.sampled_from(
    [
        "\x00",
        "\ud800",
        "\udfff",
        "\u200d",
        "\ufeff",
        "\u202e",
        "\u0301",
        "\ufdd0",
        "😀",
        "👩‍👩‍👧",
        "\n",
        "[SEP]",
        "<|end|>",
        " ",
    ]
)
TEXT = st.lists(st.one_of(AWKWARD, st.text(max_size=8)), max_size=20).map("".join)
once = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def ask(client: TestClient, task: Task[Any, Any], **changes: Any) -> Any:
    content = json.dumps({**task.example, **changes})
    return client.post(f"/v1/{task.name}", content=content, headers={"content-type": "application/json"})


def is_an_answer_or_a_clear_refusal(response: Any) -> bool:
    if response.status_code == 200:
        return len(response.json()["results"]) >= 1
    error = response.json()["error"]
    return response.status_code == 422 and bool(error["param"]) and bool(error["message"])


@every_task
@once
@given(text=TEXT, truncate=st.booleans())
def test_any_text(client: TestClient, task: Task[Any, Any], text: str, truncate: bool) -> None:
    assert is_an_answer_or_a_clear_refusal(ask(client, task, **{task.texts: text}, truncate=truncate))


@once
@given(context=TEXT)
def test_any_context(client: TestClient, context: str) -> None:
    body = {"question": "what is the capital?", "context": context}
    response = client.post("/v1/answer", content=json.dumps(body), headers={"content-type": "application/json"})
    assert is_an_answer_or_a_clear_refusal(response)
    for result in response.json().get("results", ()):
        if not result["abstained"]:
            assert context[result["start"] : result["end"]] == result["answer"]


@once
@given(text=TEXT)
def test_any_document_to_pick_from(client: TestClient, text: str) -> None:
    body = {"input": text, "mode": "extractive"}
    response = client.post("/v1/summarize", content=json.dumps(body), headers={"content-type": "application/json"})
    assert is_an_answer_or_a_clear_refusal(response)


JSON_VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@every_task
@once
@given(data=st.data())
def test_any_value_of_any_parameter(client: TestClient, task: Task[Any, Any], data: st.DataObject) -> None:
    name = data.draw(st.one_of(st.sampled_from(sorted(task.request.model_fields)), TEXT))
    response = ask(client, task, **{name: data.draw(JSON_VALUE)})
    assert response.status_code in (200, 404, 422), response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        return
    assert list(response.json()) != ["detail"]


@every_task
@pytest.mark.parametrize("piece", ["a", "😀", "good. ", "\u0301", "a\x00", "((((", ". . ", "\n\n"])
def test_a_hundred_thousand_characters(client: TestClient, task: Task[Any, Any], piece: str) -> None:
    text = "good " + piece * (100_000 // len(piece))
    for truncate in (False, True):
        assert is_an_answer_or_a_clear_refusal(ask(client, task, **{task.texts: text}, truncate=truncate))


@pytest.mark.parametrize("piece", ["a", "😀", "good. ", "\u0301", "a\x00", "((((", ". . ", "\n\n"])
@pytest.mark.parametrize("truncate", [False, True])
def test_a_hundred_thousand_characters_to_be_read_in_windows(client: TestClient, piece: str, truncate: bool) -> None:
    text = "good " + piece * (100_000 // len(piece))
    for path, body in (
        ("/v1/answer", {"question": "what?", "context": text}),
        ("/v1/summarize", {"input": text, "mode": "extractive"}),
    ):
        response = client.post(path, json={**body, "truncate": truncate})
        assert is_an_answer_or_a_clear_refusal(response)
        assert response.status_code == 200 or not truncate
