"""A model folder is loaded whole and unaltered, or refused with the name of the file that is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.config import TransformerConfig
from models.manifest import (
    FORMAT_VERSION,
    ArtefactError,
    GenerationDefaults,
    Manifest,
    Parent,
    Quantisation,
    Score,
    SpecialIds,
    TrainingData,
    TrainingEnergy,
    load_manifest,
    read_manifest,
    write_manifest,
)

FILES = {"model.onnx": b"\x08\x0a graph", "tokenizer.json": b"{}", "README.md": "Modèle\n".encode()}
MANIFEST = Manifest(
    name="tiny-answer",
    revision="1",
    description="A model for the tests.",
    tasks=("answer",),
    languages=("en",),
    config=TransformerConfig(
        architecture="encoder",
        style="bert",
        head="span",
        vocab_size=100,
        d_model=32,
        n_heads=4,
        d_ff=64,
        n_encoder_layers=2,
        max_positions=16,
    ),
    max_input_tokens=16,
    special_ids=SpecialIds(pad=0, cls=2, sep=3),
    generation=GenerationDefaults(max_tokens=8),
    chat_template="{{ messages }}",
    quantisation=Quantisation(scheme="blockwise", bits=8, block_size=32, parity_cosine=0.999),
    parent=Parent(name="tiny", relation="fine-tuned", licence="Apache-2.0"),
    training_data=(TrainingData(name="squad", licence="CC BY-SA 4.0", rows=87_599),),
    scores=(Score(data="squad", split="validation", metric="f1", value=80.5, rows=10_570),),
    training_energy=TrainingEnergy(joules=None, gco2e=None, seconds=60.0, quality="unavailable"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as training writes it."""
    path = tmp_path / "model"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    write_manifest(path, MANIFEST)
    return path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the manifest as somebody with an editor could."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_what_is_written_is_what_is_loaded(folder: Path) -> None:
    loaded = load_manifest(folder)
    assert loaded == write_manifest(folder, MANIFEST)
    assert loaded.model_copy(update={"files": {}}) == MANIFEST
    assert set(loaded.files) == set(FILES)
    assert loaded.size_bytes == sum(map(len, FILES.values()))
    assert sorted(os.listdir(folder)) == sorted([*FILES, "manifest.json"])


def test_writing_again_changes_no_byte(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, MANIFEST)
    assert (folder / "manifest.json").read_bytes() == before


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    description=st.text(),
    template=st.none() | st.text(),
    labels=st.lists(st.text(), max_size=4),
    value=st.floats(allow_nan=False, allow_infinity=False),
    content=st.binary(max_size=64),
)
def test_any_text_and_number_survives(
    folder: Path, description: str, template: str | None, labels: list[str], value: float, content: bytes
) -> None:
    manifest = MANIFEST.model_copy(
        update={
            "description": description,
            "chat_template": template,
            "labels": tuple(labels),
            "scores": (Score(data="d", split="s", metric="m", value=value, rows=1),),
        }
    )
    (folder / "model.onnx").write_bytes(content)
    assert write_manifest(folder, manifest) == load_manifest(folder)


def test_an_altered_file_is_refused(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(FILES["model.onnx"].swapcase())
    with pytest.raises(ArtefactError, match=r"^model\.onnx: altered"):
        load_manifest(folder)


@pytest.mark.parametrize("content", [b"", FILES["model.onnx"][:-1], FILES["model.onnx"] + b"\x00"])
def test_a_file_of_another_size_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"^model\.onnx: {len(content)} bytes where the manifest says"):
        load_manifest(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtefactError, match=r"^tokenizer\.json: .*missing"):
        load_manifest(folder)


def test_a_folder_in_a_files_place_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ArtefactError, match=r"^tokenizer\.json: "):
        load_manifest(folder)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtefactError, match=r"^manifest\.json: missing"):
            load_manifest(folder)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, True, 1.0, "1", None, [1]])
def test_an_unknown_format_version_is_refused(folder: Path, version: object) -> None:
    edit(folder, lambda document: document.update(format_version=version))
    with pytest.raises(ArtefactError, match=r"^manifest\.json: format_version"):
        load_manifest(folder)


def test_a_manifest_without_a_format_version_is_refused(folder: Path) -> None:
    edit(folder, lambda document: document.pop("format_version"))
    with pytest.raises(ArtefactError, match=r"^manifest\.json: format_version"):
        load_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "../outside",
        "..",
        ".",
        "",
        "/etc/hostname",
        "sub/model.onnx",
        "./model.onnx",
        "sub/../model.onnx",
        "model.onnx/",
        "..\\outside",
        "C:\\outside",
        "\x00",
        "x" * 300,
    ],
)
def test_a_path_that_is_no_plain_file_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(FILES["model.onnx"])
    edit(folder, lambda document: document["files"].update({name: document["files"]["model.onnx"]}))
    with pytest.raises(ArtefactError) as caught:
        load_manifest(folder)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_link_in_a_files_place_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes(FILES["model.onnx"])
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(outside)
    with pytest.raises(ArtefactError, match=r"^model\.onnx: leaves the model folder"):
        load_manifest(folder)
    with pytest.raises(ArtefactError, match=r"^model\.onnx: only plain files"):
        write_manifest(folder, MANIFEST)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda document: document.update(colour="green"), "colour"),
        (lambda document: document["config"].update(colour="green"), "config.colour"),
        (lambda document: document["files"]["model.onnx"].update(colour="green"), "files.model.onnx.colour"),
        (lambda document: document.pop("tasks"), "tasks"),
        (lambda document: document.update(tasks=[]), "config"),
        (lambda document: document["config"].update(head="embed"), "config"),
        (lambda document: document.update(tasks=["cook"]), "tasks.0"),
        (lambda document: document.update(name="../tiny"), "name"),
        (lambda document: document["config"].update(n_heads=5), "config"),
        (lambda document: document.update(files=["model.onnx"]), "files"),
    ],
)
def test_a_field_that_is_unknown_missing_or_wrong_is_named(
    folder: Path, change: Callable[[dict[str, Any]], object], where: str
) -> None:
    edit(folder, change)
    with pytest.raises(ArtefactError) as caught:
        load_manifest(folder)
    assert str(caught.value).startswith(f"manifest.json: {where}: ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format_version": 1', b"\xff\xfe", b"[]", b'"text"', b"null", b"[" * 100_000]
)
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"^manifest\.json: "):
        load_manifest(folder)


def test_a_subfolder_is_not_written_into_a_manifest(folder: Path) -> None:
    (folder / "weights").mkdir()
    with pytest.raises(ArtefactError, match=r"^weights: only plain files"):
        write_manifest(folder, MANIFEST)


def test_a_manifest_that_could_not_be_read_back_is_not_written(folder: Path) -> None:
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="name"):
        write_manifest(folder, MANIFEST.model_copy(update={"name": "Not A Name"}))
    assert (folder / "manifest.json").read_bytes() == before


def test_reading_alone_hashes_nothing(folder: Path) -> None:
    loaded = load_manifest(folder)
    (folder / "model.onnx").unlink()
    assert read_manifest(folder) == loaded
