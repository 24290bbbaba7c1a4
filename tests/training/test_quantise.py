"""One model stored in every way: the same weights, honest differences, scores of the served model."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest

import wattle
from models.graph import write_graphs
from models.manifest import Quantisation, Score, load_manifest, write_manifest
from models.weights import read_weights
from tests.tiny import KINDS, tiny_config, tiny_transformer, weights_of, write_tiny
from tests.training import recipes
from training.commands import run_import, run_quantising
from training.errors import TrainingError
from training.export import export
from training.importing import import_model
from training.quantise import ROUNDS, WAYS, quantise, store_anew, subjects_of
from training.recipe import Storage
from training.settings import Settings
from training.train import train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "error"),
    [
        (Storage(scheme="none"), 0.0),
        # Half a step; a whole one where blocks cut off what lies above their highest code.
        (Storage(scheme="rowwise"), 0.5 / 127),
        (Storage(scheme="rowwise", bits=7), 0.5 / 63),
        (Storage(scheme="calibrated"), 0.5 / 127),
        (Storage(scheme="blockwise", block_size=32), 1 / 128),
        (Storage(scheme="blockwise", bits=4, block_size=16), 1 / 8),
    ],
)
def test_weights_come_back_as_they_were_stored(tmp_path, kind, how, error):
    config = tiny_config(kind)
    weights = weights_of(tiny_transformer(config))
    write_graphs(tmp_path, config, weights, how.scheme, how.bits, how.block_size)
    found = read_weights(tmp_path, Quantisation(scheme=how.scheme, bits=how.bits, block_size=how.block_size))
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].shape == weight.shape and found[name].dtype == np.float32
        assert np.abs(found[name] - weight).max() <= error * np.abs(weight).max() * 1.001


@pytest.mark.parametrize("scheme", ["rowwise", "calibrated", "blockwise"])
def test_embeddings_of_four_bits(tmp_path, scheme):
    config = tiny_config("bert-classify")
    weights = weights_of(tiny_transformer(config))
    sizes = {}
    for bits in (8, 4):
        folder = tmp_path / str(bits)
        folder.mkdir()
        write_graphs(folder, config, weights, scheme, table_bits=bits)
        sizes[bits] = (folder / "weights.bin").stat().st_size
        found = read_weights(folder, Quantisation(scheme=scheme, bits=8, table_bits=bits))
        for name, weight in weights.items():
            is_table = name in ("embed.token.weight", "embed.position.weight")
            error = 1 / 8 if bits == 4 and is_table else 1 / 127
            assert np.abs(found[name] - weight).max() <= error * np.abs(weight).max() * 1.001
    assert sizes[4] < 0.9 * sizes[8]
    with pytest.raises(ValueError, match="a decoder's are, have 8 bits"):
        write_graphs(tmp_path, tiny_config("decoder"), {}, scheme, table_bits=4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("quantise")
    recipe = recipes.translate(evaluate=[{"path": "translation/numbers"}])
    export(recipe, train(recipe, data, root / "runs"), data, root / "out")
    return recipe, root / "out" / recipe.name


def test_what_is_quantised_again_is_a_model(tmp_path, data, exported):
    recipe, folder = exported
    whole = quantise(folder, recipe, data, Storage(scheme="none"), tmp_path / "whole")
    assert load_manifest(tmp_path / "whole") == whole
    assert whole.quantisation.parity_max_error == 0
    # The codes stand for these very weights: stored the same way again, they are the same codes.
    again = quantise(tmp_path / "whole", recipe, data, recipe.export, tmp_path / "again")
    assert again.files["weights.bin"].sha256 == load_manifest(folder).files["weights.bin"].sha256


class Meter:
    """Serves models; a text costs a joule for every 8 bits of a weight, a hundred times that in one round."""

    def __init__(self, disturbed=range(0)):
        self.asked = []
        self.disturbed = disturbed

    @contextmanager
    def serve(self, path):
        stored = load_manifest(path).quantisation

        def ask(task, body):
            self.asked.append((stored.scheme, stored.bits, tuple(body["input"])))
            factor = 100 if len(self.asked) in self.disturbed else 1
            joules = factor * stored.bits / 8 * len(body["input"])
            results = [{"text": "zwei drei"} for _ in body["input"]]
            return {"results": results, "energy": {"active_j": joules, "quality": "estimated"}}

        yield ask


def test_every_way_is_measured_and_told(tmp_path, data, exported, capsys):
    recipe, folder = exported
    meter = Meter()
    path = tmp_path / "recipe.toml"
    write_recipe(path, recipe)
    run_quantising([folder], meter.serve, Settings(data=data, recipe=str(path), write=True))
    manifest = load_manifest(folder)
    assert [variant.scheme for variant in manifest.variants] == [how.scheme for how in WAYS]
    assert [variant.active_j_per_query for variant in manifest.variants] == [4, 1, 1, 7 / 8, 1, 0.5]
    assert all(variant.scores[0].metric == "sacreBLEU" for variant in manifest.variants)
    sizes = [variant.size_mb for variant in manifest.variants]
    assert sizes[0] == max(sizes)
    load = manifest.variants[0].load
    assert (load.texts_per_request, load.rounds, load.queries) == (16, ROUNDS, 16 * ROUNDS)
    card = (folder / "README.md").read_text()
    assert "Ways to store it" in card and f"median of {ROUNDS} rounds of 16 queries" in card
    printed = capsys.readouterr().out
    assert printed.count("(estimated) a query") == len(WAYS) and "; 0.5 J (estimated)" in printed


def test_a_model_is_measured_once_in_each_setting_that_its_recipe_asks_in(tmp_path, data, exported, capsys):
    folder = exported[1]
    sets = [{"path": "translation/numbers", "setting": setting} for setting in ({}, {"beams": 1})]
    path = tmp_path / "recipe.toml"
    write_recipe(path, recipes.translate(evaluate=sets))

    @contextmanager
    def serve(path):
        def ask(task, body):
            energy = {"active_j": len(body["input"]) * body.get("beams", 4) / 4, "quality": "estimated"}
            return {"results": [{"text": "zwei"} for _ in body["input"]], "energy": energy}

        yield ask

    run_quantising([folder], serve, Settings(data=data, recipe=str(path), write=True))
    manifest = load_manifest(folder)
    found = [(each.scheme, each.setting, each.active_j_per_query) for each in manifest.variants]
    assert found == [(how.scheme, said, j) for said, j in (("", 1), ("beams 1", 0.25)) for how in WAYS]
    assert manifest.stored_as("rowwise", 8) == manifest.variants[1]
    assert manifest.stored_as("rowwise", 4) is None
    assert "rowwise, 8 bits, beams 1: " in capsys.readouterr().out
    score = manifest.variants[-1].scores[0]
    card = (folder / "README.md").read_text()
    assert f"| setting | sacreBLEU (translation/numbers, {score.rows} rows) |" in card
    assert f"| beams 1 | {score.value:.2f} | 0.25 (estimated) |" in card


def test_models_take_turns_at_the_same_queries_and_a_disturbed_round_counts_for_nothing(tmp_path, data, exported):
    recipe, folder = exported
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    path = tmp_path / "recipe.toml"
    write_recipe(path, recipe)
    turns = 2 * len(WAYS)
    # Each way is scored with one request first; of what follows, the second counted round.
    meter = Meter(disturbed=range(3 * turns + 1, 4 * turns + 1))
    run_quantising([folder, twin], meter.serve, Settings(data=data, recipe=str(path), write=True))
    measured = meter.asked[turns:]
    assert len(measured) == turns * (ROUNDS + 1)
    for start in range(0, len(measured), turns):
        a_round = measured[start : start + turns]
        assert [bits for _, bits, _ in a_round] == [32, 8, 8, 7, 8, 4] * 2
        assert len({texts for _, _, texts in a_round}) == 1
    for each in (folder, twin):
        assert [variant.active_j_per_query for variant in load_manifest(each).variants] == [4, 1, 1, 7 / 8, 1, 0.5]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_is_stored_anew(tmp_path, kind, capsys):
    before = write_tiny(tmp_path / "before", kind, name="before", scheme="rowwise")
    scored = before.model_copy(update={"scores": (Score(data="d", split="s", metric="m", value=1.0, rows=1),)})
    write_manifest(tmp_path / "before", scored)
    command = ["import", str(tmp_path / "before"), "--scheme", "float16", "--out", str(tmp_path / "out")]
    assert wattle.main(command) == 0
    assert "out/before: " in capsys.readouterr().out
    after = load_manifest(tmp_path / "out" / "before")
    kept = {"files", "quantisation", "scores"}
    assert after.model_dump(exclude=kept) == before.model_dump(exclude=kept)
    assert (after.quantisation.scheme, after.quantisation.bits, after.scores) == ("float16", 16, ())
    assert after.quantisation.parity_cosine > 0.999
    weights = [
        read_weights(tmp_path / name, each.quantisation) for name, each in (("before", before), ("out/before", after))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.abs(weights[0][name] - weights[1][name]).max() < 0.01 for name in weights[0])
    # In place, too, and under another name.
    settings = Settings(out=tmp_path / "out", scheme="none", name="other")
    run_import(str(tmp_path / "out" / "before"), settings)
    assert load_manifest(tmp_path / "out" / "other").name == "other"
    with pytest.raises(TrainingError, match="`wattle export` does it"):
        store_anew(tmp_path / "before", tmp_path / "out", None, Storage(scheme="calibrated"))
    with pytest.raises(TrainingError, match="which languages it has"):
        import_model(tmp_path / "before", tmp_path / "out", source_language="en")
    with pytest.raises(TrainingError, match="leave --max-positions out"):
        import_model(tmp_path / "before", tmp_path / "out", max_positions=16)


def test_a_setting_is_asked_of_every_set_or_of_none(exported):
    _, folder = exported
    numbers, greedy = ({"path": "translation/numbers", **more} for more in ({}, {"setting": {"beams": 1}}))
    other = {"path": "translation/others"}
    manifest = load_manifest(folder)
    uneven = recipes.translate(evaluate=[numbers, other, greedy])
    with pytest.raises(TrainingError, match="sets in more settings than others"):
        subjects_of(folder, manifest, uneven)
    even = recipes.translate(evaluate=[numbers, other, greedy, {**other, "setting": {"beams": 1}}])
    assert [[each.path for each in subject.sets] for subject in subjects_of(folder, manifest, even)] == [
        ["translation/numbers", "translation/others"]
    ] * 2


def test_a_bill_without_a_figure_makes_the_figure_unknown(tmp_path, data, exported):
    recipe, folder = exported

    @contextmanager
    def serve(path):
        def ask(task, body):
            return {"results": [{"text": ""}] * len(body["input"]), "energy": {"active_j": None, "quality": "x"}}

        yield ask

    path = tmp_path / "recipe.toml"
    write_recipe(path, recipe)
    run_quantising([folder], serve, Settings(data=data, recipe=str(path), write=True))
    variants = load_manifest(folder).variants
    assert {(each.active_j_per_query, each.quality) for each in variants} == {(None, "unavailable")}


def write_recipe(path, recipe):
    """As TOML, which the standard library reads but does not write."""

    def lines(table, prefix=""):
        inner = {key: value for key, value in table.items() if isinstance(value, dict)}
        for key, value in table.items():
            if value is None or key in inner or (isinstance(value, list) and value and isinstance(value[0], dict)):
                continue
            yield f"{key} = {literal(value)}"
        for key, value in inner.items():
            yield f"[{prefix}{key}]"
            yield from lines(value, f"{prefix}{key}.")
        for key, value in table.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                for each in value:
                    yield f"[[{prefix}{key}]]"
                    yield from lines(each, f"{prefix}{key}.")

    def literal(value):
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, list):
            return "[" + ", ".join(map(literal, value)) + "]"
        return f'"{value}"' if isinstance(value, str) else repr(value)

    path.write_text("\n".join(lines(recipe.model_dump(mode="json"))))
