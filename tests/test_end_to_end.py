"""The main job, whole, on a tiny model: a recipe is trained, exported, served, and its answer is right and billed."""

import gzip
import itertools
import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import wattle
from service.app import create_app
from service.settings import Settings

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
RECIPE = """
name = "translate-tiny"
task = "translate"
description = "Numbers, English to German."
languages = ["en", "de"]
licence = "CC0"
max_tokens = 48
max_target_tokens = 48
data = [{ path = "numbers", licence = "CC0", where = "made by this test" }]
evaluate = [{ path = "numbers" }]

[model]
architecture = "encoder-decoder"
style = "modern"
head = "lm"
vocab_size = 290
d_model = 64
n_heads = 2
d_ff = 128
n_encoder_layers = 1
n_decoder_layers = 1
max_positions = 64

[tokenizer]
kind = "byte-bpe"
vocab_size = 290

[fit]
epochs = 60
batch_tokens = 256
learning_rate = 5e-3
optimiser = "muon"
precision = "float32"

[export]
max_input_tokens = 48
max_output_tokens = 48
block_size = 32

[export.generation]
max_tokens = 48
beams = 2
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the recipe, its data and all that the commands leave."""
    folder = tmp_path_factory.mktemp("end-to-end")
    (folder / "translate-tiny.toml").write_text(RECIPE, encoding="utf-8")
    (folder / "data" / "numbers").mkdir(parents=True)
    pairs = itertools.product(WORDS.items(), repeat=2)
    # Four words each: BLEU looks at runs of four.
    rows = [{"source": f"{a} {b} {b} {a}", "target": f"{x} {y} {y} {x}"} for (a, x), (b, y) in pairs]
    for split in ("train", "validation"):
        with gzip.open(folder / "data" / "numbers" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_trained_exported_served_answered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(folder / "data"), "--runs", str(folder / "runs"), "--out", str(folder / "models")]
    recipe = str(folder / "translate-tiny.toml")
    assert wattle.main(["train", recipe, *places, "--threads", "1"]) == 0
    assert "translate-tiny: " in capsys.readouterr().out

    settings = Settings(models=(folder / "models",), state=folder / "state")
    with TestClient(create_app(settings)) as client:
        answer = client.post("/v1/translate", json={"input": ["two six six two", "five one one five"], "target": "de"})
        assert answer.status_code == 200
        body = answer.json()
        assert [result["text"].strip() for result in body["results"]] == [
            "zwei sechs sechs zwei",
            "fünf eins eins fünf",
        ]
        assert body["model"] == "translate-tiny"
        assert body["energy"]["active_j"] > 0
        assert body["energy"]["allocated_j"] >= body["energy"]["active_j"]
        assert body["energy"]["gco2e"] > 0
        assert float(answer.headers["x-energy-joules"]) > 0
        settled = client.get(f"/v1/energy/requests/{body['id']}")
        assert settled.status_code == 200

    # The recipe is no shipped one: evaluation finds it by the path that it is given.
    assert wattle.main(["evaluate", str(folder / "models" / "translate-tiny"), *places[:2], "--recipe", recipe]) == 0
    found = re.search(r"sacreBLEU ([\d.]+)", capsys.readouterr().out)
    # Not all of 36 sentences come out right on every processor; a model that had learnt nothing would be near 0.
    assert found is not None and float(found[1]) > 90

    assert wattle.main(["models", "--models", str(folder / "models")]) == 0
    assert "translate-tiny" in capsys.readouterr().out


def test_a_mistake_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wattle.main(["train", "translate-en-de-teacher", "--data", str(folder), "--runs", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "translation/tatoeba-en-de: no such file" in said
    assert wattle.main(["evaluate", str(folder)]) == 1
    assert "manifest.json: missing" in capsys.readouterr().err
    assert wattle.main(["export", "translate-en-de", "--runs", str(folder), "--max-mb", "-3"]) == 1
    assert "max_mb" in capsys.readouterr().err
