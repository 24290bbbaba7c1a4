"""Sound models are served, damaged ones are refused by name, and neither stops the other."""

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from models.manifest import ArtefactError, GenerationDefaults, SpecialIds, read_manifest, write_manifest
from service.app import check_manifest, create_app
from service.engine.types import EngineFailed
from service.errors import ModelNotFound
from service.models import load_model, load_models
from service.settings import Settings
from tests.service.fakes import CHAT_TEMPLATE, MODEL_BYTES, build, manifest, write_model


def test_a_root_holds_models_or_is_one(tmp_path: Path) -> None:
    write_model(tmp_path / "many", "b", "sentiment")
    write_model(tmp_path / "many", "a", "sentiment")
    (tmp_path / "many" / ".partial").mkdir()
    (tmp_path / "many" / "README.md").write_text("not a model")
    one = write_model(tmp_path / "other", "c", "sentiment")
    models = load_models([one, tmp_path / "many"], check_manifest)
    assert (list(models.served), list(models.refused)) == (["c", "a", "b"], [])
    assert models.pick("sentiment", None).name == "c"
    assert models.pick("sentiment", "b").name == "b"


def test_a_model_has_aliases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path, "a", "sentiment")
    aliases = {"b": "a", "c": "nobody", "some/one": "a"}
    with TestClient(create_app(Settings(models=(tmp_path,), model_aliases=aliases), build)) as client:
        # As on the Hub, a name may hold a slash.
        assert client.get("/v1/models/some/one").json()["root"] == "a"
        assert client.post("/hf/some/one", json={"inputs": "good"}).status_code == 200
        chat = {"messages": [{"role": "user", "content": "good"}]}
        assert client.post("/hf/some/one/v1/chat/completions", json=chat).status_code == 200
        assert client.post("/v1/sentiment", json={"input": "good", "model": "b"}).json()["model"] == "a"
        assert client.post("/v1/sentiment", json={"input": "good", "model": "c"}).status_code == 404
    assert "the alias c names the model nobody, which is not served" in caplog.text
    models = load_models([tmp_path], check_manifest, aliases)
    assert models.named("b") is models.named("a")
    with pytest.raises(ModelNotFound, match="'c' is not loaded; loaded are: a, b"):
        models.named("c")


def test_two_models_cannot_share_a_name(tmp_path: Path) -> None:
    write_model(tmp_path / "first", "same", "sentiment")
    write_model(tmp_path / "second", "same", "sentiment")
    models = load_models([tmp_path / "first", tmp_path / "second"], check_manifest)
    assert models.served["same"].folder.parent.name == "first"
    assert [refusal.folder_name for refusal in models.refused] == ["same"]


def damage_weights(folder: Path) -> str:
    (folder / "model.onnx").write_bytes(b"No weights")
    return "model.onnx"


def lose_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def link_manifest_nowhere(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    return "manifest.json"


def from_the_future(folder: Path) -> str:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, "format_version": 99}))
    return "manifest.json"


@pytest.mark.parametrize(
    "damage", [damage_weights, lose_tokenizer, lose_manifest, link_manifest_nowhere, from_the_future]
)
def test_a_damaged_model_is_refused_by_file_and_the_others_are_served(
    tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    root = tmp_path / "models"
    write_model(root, "sound", "sentiment")
    file_name = damage(write_model(root, "damaged", "answer"))
    with TestClient(create_app(settings.model_copy(update={"models": (root,)}), build)) as client:
        response = client.get("/readyz")
        body = response.json()
        assert (response.status_code, body["status"]) == (200, "ready")
        shown = {"name": "sound", "revision": "1", "tasks": ["sentiment"], "bits": 32}
        assert body["models"] == [{**shown, "state": "loaded", "memory_mb": MODEL_BYTES / 1e6}]
        assert [refused["folder"] for refused in body["refused"]] == ["damaged"]
        assert file_name in body["refused"][0]["reason"]
        assert str(tmp_path) not in response.text
        assert file_name in caplog.text
        assert client.post("/v1/sentiment", json={"input": "good"}).status_code == 200
        assert client.post("/v1/answer", json={"question": "what", "context": "x"}).status_code == 404


def test_without_any_model_the_service_is_not_ready(tmp_path: Path, settings: Settings) -> None:
    damage_weights(write_model(tmp_path / "models", "damaged", "sentiment"))
    chosen = settings.model_copy(update={"models": (tmp_path / "models",)})
    with TestClient(create_app(chosen, build)) as client:
        response = client.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (503, "not ready")
        assert client.get("/livez").json() == {"status": "alive"}
        response = client.post("/v1/sentiment", json={"input": "good"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")


def test_a_service_that_has_lost_its_device_says_so(tmp_path: Path, settings: Settings) -> None:
    write_model(tmp_path / "models", "sound", "sentiment")
    chosen = settings.model_copy(update={"models": (tmp_path / "models",)})
    app = create_app(chosen, build)
    with TestClient(app) as client:
        engine = app.state.service.engine
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        engine.lost = engine.refusal = EngineFailed("gpu:0")
        answers = [client.get("/livez"), client.post("/v1/sentiment", json={"input": "good"})]
        ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
    assert ready.json()["engine"].startswith("gpu:0 has failed")
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "engine_failed")
        assert error["message"].startswith("gpu:0 has failed")


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff"])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path, "m", "sentiment")
    (folder / "tokenizer.json").write_bytes(content)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(ArtefactError, match=r"^tokenizer\.json: "):
        load_model(folder)


def test_a_chat_template_that_is_none_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "m", "generate", chat_template=CHAT_TEMPLATE + "{% endfor %}")
    with pytest.raises(ArtefactError, match="chat_template"):
        load_model(folder)


SPAN = {"architecture": "encoder", "head": "span", "n_encoder_layers": 1}


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("sentiment", {"labels": ("negative", "positive")}),
        ("sentiment", {"config": SPAN}),
        ("answer", {"special_ids": SpecialIds(pad=0, cls=2)}),
        ("answer", {"config": {"architecture": "encoder", "head": "classify", "n_encoder_layers": 1, "n_labels": 3}}),
        ("translate", {"languages": ("en",)}),
        ("translate", {"generation": None}),
        ("translate", {"layout": "optimum"}),
        ("translate", {"special_ids": SpecialIds(pad=0, eos=4)}),
        ("translate", {"generation": GenerationDefaults(max_tokens=65)}),
        ("generate", {"config": SPAN}),
        ("generate", {"max_input_tokens": 255}),
        ("summarize", {"special_ids": SpecialIds(pad=0, sep=3)}),
    ],
    ids=str,
)
def test_a_model_that_its_task_cannot_use_is_refused_at_start(task: str, fields: dict[str, Any]) -> None:
    check_manifest(manifest("sound", task))
    with pytest.raises(ArtefactError, match=r"^manifest\.json: "):
        check_manifest(manifest("unsound", task, **fields))
