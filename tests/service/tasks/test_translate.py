"""Language pairs choose the model; the manifest's beams are the default."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.engine.types import Overloaded
from service.settings import Settings
from tests.service.fakes import EOS, FakeEngine, build, write_model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    write_model(root, "a-en-de", "translate", languages=("en", "de"))
    write_model(root, "b-en-fr", "translate", languages=("en", "fr"))
    write_model(root, "c-de-en", "translate", languages=("de", "en"))
    return root


@pytest.mark.parametrize(
    ("choice", "model"),
    [
        ({}, "a-en-de"),
        ({"source": "en"}, "a-en-de"),
        ({"source": "de"}, "c-de-en"),
        ({"target": "fr"}, "b-en-fr"),
        ({"source": "en", "target": "fr"}, "b-en-fr"),
        ({"model": "c-de-en"}, "c-de-en"),
        ({"model": "c-de-en", "source": "de"}, "c-de-en"),
    ],
    ids=str,
)
def test_the_pair_chooses_the_model(settings: Settings, pairs: Path, choice: dict[str, Any], model: str) -> None:
    with TestClient(create_app(settings.model_copy(update={"models": (pairs,)}), build)) as client:
        assert client.post("/v1/translate", json={"input": "good", **choice}).json()["model"] == model


@pytest.mark.parametrize(
    ("choice", "param", "named"),
    [
        ({"source": "fr"}, "source", ["en to de", "en to fr", "de to en"]),
        ({"target": "pt"}, "target", ["en to de", "en to fr", "de to en"]),
        ({"source": "de", "target": "fr"}, "target", ["de to en"]),
        ({"model": "b-en-fr", "target": "de"}, "target", ["en to fr"]),
    ],
    ids=str,
)
def test_a_pair_that_nobody_translates_names_those_there_are(
    settings: Settings, pairs: Path, choice: dict[str, Any], param: str, named: list[str]
) -> None:
    with TestClient(create_app(settings.model_copy(update={"models": (pairs,)}), build)) as client:
        response = client.post("/v1/translate", json={"input": "good", **choice})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (422, param, "unsupported_languages")
    assert all(pair in error["message"] for pair in named)


def test_the_source_ends_with_its_own_token_and_beams_have_a_default(client: TestClient, engine: FakeEngine) -> None:
    client.post("/v1/translate", json={"input": "good"})
    client.post("/v1/translate", json={"input": "good", "beams": 8})
    assert [item.input_ids[-1] for item in engine.items] == [EOS, EOS]
    assert [item.sampling.beams for item in engine.items] == [1, 8]
    assert client.post("/v1/translate", json={"input": "good", "beams": 9}).status_code == 422


def test_special_tokens_are_no_part_of_the_text(client: TestClient) -> None:
    (result,) = client.post("/v1/translate", json={"input": "paris is good"}).json()["results"]
    assert result == {"text": "paris is good", "finish_reason": "stop"}


def test_a_cut_text_keeps_its_start_and_its_end_token(client: TestClient, engine: FakeEngine) -> None:
    body = {"input": "good " * 500 + "bad " * 500, "truncate": True}
    client.post("/v1/translate", json=body)
    (item,) = engine.items
    assert len(item.input_ids) == 128
    assert set(item.input_ids[:-1]) == {item.input_ids[0]}
    assert item.input_ids[-1] == EOS


@pytest.mark.parametrize(
    ("text", "sentences", "translated"),
    [
        ("good dog", ["good dog"], "good dog"),
        ("  good dog\n\nbad city\n", ["good dog", "bad city"], "  good dog\n\nbad city\n"),
        # A sentence goes on in the next line where that begins small.
        ("Good dog runs\nalong the beach\nBad city", ["good dog runs along the beach", "bad city"], None),
        ("good dog\n---\n\U0001f600\nbad city", ["good dog", "bad city"], "good dog\n---\n\U0001f600\nbad city"),
        ("---", ["- - -"], None),
        ("Good dog! Bad city!", ["good dog !", "bad city !"], "good dog ! bad city !"),
    ],
)
def test_a_text_is_translated_sentence_by_sentence_and_keeps_its_form(
    client: TestClient, engine: FakeEngine, text: str, sentences: list[str], translated: str | None
) -> None:
    asked = {"input": [text, "fine"]}
    answer = client.post("/v1/translate", json=asked).json()
    tokenizer = client.app.state.service.models.named("tiny-translate").tokenizer  # type: ignore[attr-defined]
    assert [tokenizer.decode(item.input_ids) for item in engine.items] == [*sentences, "fine"]
    first, second = answer["results"]
    assert translated in (None, first["text"]) and second["text"] == "fine"
    assert answer["usage"]["input_tokens"] == sum(len(item.input_ids) for item in engine.items)
    lines = client.post("/v1/translate", json={**asked, "stream": True}).text.split("\n\n")
    *pieces, last = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert last["results"] == answer["results"]
    assert "".join(piece["delta"] for piece in pieces if piece["index"] == 0) == first["text"]


def test_some_languages_put_no_space_between_sentences(settings: Settings, tmp_path: Path) -> None:
    write_model(tmp_path, "a-en-zh", "translate", languages=("en", "zh"))
    write_model(tmp_path, "b-zh-en", "translate", languages=("zh", "en"))
    with TestClient(create_app(settings.model_copy(update={"models": (tmp_path,)}), build)) as client:
        for model, text, translated in (
            ("a-en-zh", "Good dog! Bad city!\nFine!", "good dog !bad city !\nfine !"),
            # The tiny models have no word for the full stop, and do not tell it.
            ("b-zh-en", "good\u3002bad\u3002", "good bad"),
        ):
            (result,) = client.post("/v1/translate", json={"input": text, "model": model}).json()["results"]
            assert result["text"] == translated


def test_many_sentences_come_in_groups_and_wait_for_room(client: TestClient, engine: FakeEngine) -> None:
    submit, groups = engine.submit, []

    def busy(model: str, items: Any, key: str) -> Any:
        groups.append(len(items))
        if len(groups) == 2:
            raise Overloaded(0.01)
        return submit(model, items, key)

    engine.submit = busy  # type: ignore[method-assign]
    text = "\n".join(["good dog"] * 40)
    (result,) = client.post("/v1/translate", json={"input": text}).json()["results"]
    assert result["text"] == text
    assert groups == [32, 8, 8]


def test_a_text_of_very_many_sentences_is_refused_or_cut(client: TestClient, engine: FakeEngine) -> None:
    text = "\n".join(["good " * 100] * 50)
    refused = client.post("/v1/translate", json={"input": text})
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "too_many_tokens")
    (result,) = client.post("/v1/translate", json={"input": text, "truncate": True}).json()["results"]
    assert len(result["text"].splitlines()) == len(engine.items) == 41


def test_where_a_sentence_is_cut_the_text_says_so(client: TestClient) -> None:
    # The tiny models write 64 tokens at most.
    (result,) = client.post("/v1/translate", json={"input": f"{'good ' * 70}\nbad"}).json()["results"]
    assert result == {"text": f"{('good ' * 64).strip()} \nbad", "finish_reason": "length"}


def test_what_comes_after_the_budget_is_left_out(client: TestClient) -> None:
    # Every look at the account finds 0.1 J more, and a prediction is not there yet.
    body = {"input": f"good dog\n{'bad ' * 60}\nfine city\n", "energy_budget_j": 0.35}
    (result,) = client.post("/v1/translate", json=body).json()["results"]
    assert result["finish_reason"] == "energy_budget"
    assert result["text"].startswith("good dog\nbad bad") and "fine" not in result["text"]
