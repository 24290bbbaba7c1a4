"""Summaries are written as a person would, or picked sentence by sentence."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.app import create_app
from service.models import Model, load_model
from service.tasks.summarize import Extract, Window, pick_sentences, split_document
from tests.service.fakes import CLS, SEP, FakeEngine, build, write_model


def summarize(client: TestClient, text: str, **changes: Any) -> Any:
    response = client.post("/v1/summarize", json={"input": text, **changes})
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return result


def test_a_written_summary_has_the_documents_capitals(client: TestClient, engine: FakeEngine) -> None:
    text = "Alice said hello. The city on the river is Paris, Bob said."
    assert summarize(client, text) == {"text": text, "finish_reason": "stop"}
    assert (engine.items[0].input_ids[0], engine.items[0].input_ids[-1]) == (CLS, SEP)


def test_a_written_summary_may_be_cut_at_its_limit(client: TestClient) -> None:
    assert summarize(client, "Paris is good.", max_tokens=3) == {"text": "Paris is", "finish_reason": "length"}


def test_sentences_are_picked_by_score_in_the_documents_order(client: TestClient, engine: FakeEngine) -> None:
    # The engine scores a sentence by its first word's number: good < paris < where < beach.
    text = "Beach runs. Good dog. Where it rains.\n\nParis is fine."
    expected = "Beach runs. Where it rains. Paris is fine."
    assert summarize(client, text, mode="extractive") == {"text": expected, "finish_reason": "stop"}
    assert summarize(client, text, mode="extractive", sentences=1)["text"] == "Beach runs."
    assert summarize(client, text, mode="extractive", sentences=99)["text"] == text.replace("\n\n", " ")


def test_a_document_of_any_length_can_be_picked_from(client: TestClient, engine: FakeEngine) -> None:
    text = "Good dog runs. " * 200 + "Where it rains. " + "Good dog. " * 200
    assert summarize(client, text, mode="extractive", sentences=1)["text"] == "Where it rains."
    assert len(engine.items) > 5


def test_a_summary_is_searched_as_wide_as_asked_and_as_the_model_says(
    client: TestClient, engine: FakeEngine, models: dict[str, Model]
) -> None:
    summarize(client, "Paris is good.")
    summarize(client, "Paris is good.", beams=3)
    default = models["summarize"].manifest.generation.beams
    assert [item.sampling.beams for item in engine.items] == [default, 3]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"sentences": 2}, "sentences"),
        ({"mode": "extractive", "beams": 2}, "beams"),
        ({"beams": 9}, "beams"),
        ({"mode": "extractive", "max_tokens": 9}, "max_tokens"),
        ({"mode": "extractive", "sentences": 0}, "sentences"),
        ({"mode": "shorter"}, "mode"),
        ({"max_tokens": 65}, "max_tokens"),
    ],
    ids=str,
)
def test_parameters_go_with_their_mode(client: TestClient, changes: dict[str, Any], param: str) -> None:
    response = client.post("/v1/summarize", json={"input": "Good.", **changes})
    assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_a_model_without_the_head_says_that_it_does_not_pick(tmp_path: Any, settings: Any) -> None:
    shape = {"architecture": "prefix-lm", "head": "lm", "n_decoder_layers": 1}
    write_model(tmp_path / "models", "writer", "summarize", config=shape)
    chosen = settings.model_copy(update={"models": (tmp_path / "models",)})
    with TestClient(create_app(chosen, build)) as client:
        response = client.post("/v1/summarize", json={"input": "Good.", "mode": "extractive"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "mode")


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_windows_break_between_sentences_and_lose_none(models: dict[str, Model], lengths: list[int]) -> None:
    model = models["summarize"]
    room = model.manifest.max_input_tokens
    sentences = [f"{'Good ' * length}dog." for length in lengths]
    windows = list(split_document(model, " ".join(sentences)))
    assert [sentence for window in windows for sentence in window.sentences] == sentences
    first = model.tokenizer.get_vocab()["good"]
    for window in windows:
        assert len(window.input_ids) <= room
        assert (window.input_ids[0], window.input_ids[-1]) == (CLS, SEP)
        assert [window.input_ids[start] for start in window.starts] == [first] * len(window.sentences)
    for left, right in pairwise(windows):
        # Windows are as full as sentences allow.
        assert len(left.input_ids) + (right.starts[1:] or (len(right.input_ids) - 1,))[0] - 1 > room


def test_equal_scores_pick_the_earlier_sentence() -> None:
    window = Window((CLS, 9, 9, SEP), ("One.", "Two."), (1, 2))
    assert pick_sentences(Extract((window,), 1), [[0.0, 1.0, 1.0, 0.0]]) == "One."


def test_a_sentence_of_nothing_readable_is_left_out(tmp_path: Any) -> None:
    model = load_model(write_model(tmp_path, "m", "summarize"))
    (window,) = split_document(model, "Good dog.\n\u200b\u200b\nBad dog.")
    assert window.sentences == ("Good dog.", "Bad dog.")
