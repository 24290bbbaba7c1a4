"""Language pairs choose the model; the manifest's beams are the default."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
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
