"""A model that starts from another's weights is that other, as far as it can be."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from models.manifest import load_manifest
from models.transformer import Transformer
from models.weights import read_weights
from tests.tiny import KINDS, write_tiny
from tests.training import recipes
from tests.training.recipes import MODERN, recipe
from training.errors import TrainingError
from training.export import export
from training.parents import ParentModel, begin_with, load_parent
from training.recipe import InitRecipe, Recipe
from training.train import load_trained, train

FIT = {**recipes.FIT, "epochs": 1}
TWO_BY_TWO = {**MODERN, "architecture": "encoder-decoder", "n_encoder_layers": 2, "n_decoder_layers": 2}


def child(parent: Recipe, source, model=None, init=None, **changes):
    """A recipe on the same data that starts from ``source``."""
    document = parent.model_dump(by_alias=True)
    document["model"] |= model or {}
    document |= {
        "name": "child",
        "trunk": None,
        "init": {"from": str(source), **(init or {})},
        "tokenizer": {"kind": "parent", "vocab_size": 300},
    }
    return Recipe.model_validate({**document, **changes})


@pytest.fixture(scope="module")
def translator(tmp_path_factory, data):
    """A run of two encoder and two decoder layers, and its folder."""
    root = tmp_path_factory.mktemp("parent")
    parent = recipe(
        "translate",
        TWO_BY_TWO,
        {"translation/numbers": {}},
        languages=["en", "de"],
        max_target_tokens=48,
        export=recipes.translate().export.model_dump(),
    )
    export(parent, train(parent, data, root / "runs"), data, root / "out")
    return parent, root / "runs", root / "out" / parent.name


def begun(parent: ParentModel, config, init=None, labels=(), kept=None):
    model = Transformer(config)
    words = np.arange(config.vocab_size) if kept is None else kept
    begin_with(model, parent, InitRecipe(source="x", **(init or {})), labels, words)
    return model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_as_its_weights(tmp_path, kind):
    manifest = write_tiny(tmp_path / kind, kind, scheme="rowwise")
    parent = load_parent(str(tmp_path / kind), tmp_path)
    weights = read_weights(tmp_path / kind, manifest.quantisation)
    assert {name: weight.shape for name, weight in parent.model.state_dict().items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    assert all(np.array_equal(parent.model.state_dict()[name].numpy(), weight) for name, weight in weights.items())
    assert parent.name == f"tiny-{kind}"


@pytest.mark.parametrize("whole", ["run", "folder"])
def test_a_child_begins_as_its_parent(translator, data, tmp_path, whole):
    parent_recipe, runs, folder = translator
    source, where = (parent_recipe.name, runs) if whole == "run" else (folder, tmp_path)
    parent = load_parent(str(source), where)
    state = begun(parent, parent_recipe.model.model_copy(update={"vocab_size": parent.tokenizer.get_vocab_size()}))
    assert all(torch.equal(state[name], weight) for name, weight in parent.model.state_dict().items())
    again = child(parent_recipe, source, fit={**FIT, "learning_rate": 0.0})
    trained = train(again, data, where)
    assert all(torch.equal(trained.model.state_dict()[name], w) for name, w in parent.model.state_dict().items())
    assert trained.tokenizer.to_str() == parent.tokenizer.to_str()
    manifest = export(again, trained, data, tmp_path / "out")
    assert (manifest.parent.name, manifest.parent.relation) == (parent_recipe.name, "fine-tuned")
    assert load_manifest(tmp_path / "out" / "child") == manifest
    said = f"child was fine-tuned from {parent_recipe.name} (CC0)."
    assert load_parent("child", where).note == said
    # The licence of what stood at the beginning is told on every card that follows.
    grandchild = train(child(parent_recipe, tmp_path / "out" / "child", name="grandchild", fit=FIT), data, tmp_path)
    assert (grandchild.parent.name, grandchild.parent.note) == ("child", said)


def test_a_student_takes_the_layers_that_are_named(translator):
    parent_recipe, runs, _ = translator
    parent = load_parent(parent_recipe.name, runs)
    theirs = parent.model.state_dict()
    config = parent.model.config.model_copy(update={"n_encoder_layers": 1, "n_decoder_layers": 1})
    named = begun(parent, config, {"layers": {"encoder": [1], "decoder": [0]}})
    assert torch.equal(named["encoder.0.attn.qkv.weight"], theirs["encoder.1.attn.qkv.weight"])
    assert torch.equal(named["decoder.0.cross.kv.weight"], theirs["decoder.0.cross.kv.weight"])
    assert torch.equal(named["decoder_norm.weight"], theirs["decoder_norm.weight"])
    first = begun(parent, config)
    assert torch.equal(first["encoder.0.attn.qkv.weight"], theirs["encoder.0.attn.qkv.weight"])


def test_a_narrow_student_keeps_the_units_that_weigh_most(translator):
    parent_recipe, runs, _ = translator
    parent = load_parent(parent_recipe.name, runs)
    with torch.no_grad():
        for layer in [*parent.model.encoder, *parent.model.decoder]:
            layer.ffn.up.weight[::2] *= 1e-3
            layer.ffn.down.weight.fill_(1.0)
    narrow = begun(parent, parent.model.config.model_copy(update={"d_ff": 32}))
    theirs = parent.model.state_dict()
    assert torch.equal(narrow["decoder.1.ffn.up.weight"], theirs["decoder.1.ffn.up.weight"][1::2])
    assert torch.equal(narrow["decoder.1.ffn.down.weight"], theirs["decoder.1.ffn.down.weight"][:, 1::2])


def test_a_reader_becomes_a_writer_and_heads_that_are_other_start_fresh(tmp_path):
    write_tiny(tmp_path / "reader", "bert-span")
    reader = load_parent(str(tmp_path / "reader"), tmp_path)
    theirs = reader.model.state_dict()
    config = reader.model.config
    writer = config.model_copy(
        update={"architecture": "prefix-lm", "head": "lm", "n_encoder_layers": 0, "n_decoder_layers": 2}
    )
    state = begun(reader, writer)
    assert torch.equal(state["decoder.1.ffn.up.bias"], theirs["encoder.1.ffn.up.bias"])
    assert torch.equal(state["head.dense.weight"], torch.eye(32))
    assert "head.out.weight" not in state

    write_tiny(tmp_path / "judge", "classify")
    judge = load_parent(str(tmp_path / "judge"), tmp_path)
    same = begun(judge, judge.model.config, labels=judge.labels)
    other = begun(judge, judge.model.config, labels=tuple(reversed(judge.labels)))
    assert torch.equal(same["head.out.weight"], judge.model.head.out.weight)
    assert not torch.equal(other["head.out.weight"], judge.model.head.out.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_model": 64}, "model.d_model: tiny-classify has 32, the recipe 64"),
        ({"n_heads": 4}, "model.n_heads: tiny-classify has 2, the recipe 4"),
        ({"d_ff": 128}, r"ffn\.up\.weight: tiny-classify has \(64, 32\), the recipe's model \(128, 32\)"),
        ({"n_encoder_layers": 3}, r"the encoder has 3 layers and takes \[0, 1\] of tiny-classify's 2"),
    ],
)
def test_what_cannot_fit_is_said(tmp_path, change, said):
    write_tiny(tmp_path / "judge", "classify")
    parent = load_parent(str(tmp_path / "judge"), tmp_path)
    with pytest.raises(TrainingError, match=said):
        begun(parent, parent.model.config.model_copy(update=change))


def test_a_parent_that_is_none_is_said(tmp_path, translator):
    _, _, folder = translator
    with pytest.raises(TrainingError, match=r"nobody: neither a run in .* nor the folder of an exported model"):
        load_parent("nobody", tmp_path)
    write_tiny(tmp_path / "judge", "classify")
    (tmp_path / "judge" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(TrainingError, match=r"tokenizer\.json: .* where the manifest says"):
        load_parent(str(tmp_path / "judge"), tmp_path)


def test_a_tokenizer_that_does_not_match_is_said(tmp_path, translator, data):
    parent_recipe, runs, _ = translator
    path = runs / parent_recipe.name / "tokenizer.json"
    document = json.loads(path.read_text())
    merge = document["model"]["merges"].pop()
    del document["model"]["vocab"]["".join(merge)]
    copy = tmp_path / "runs" / parent_recipe.name
    copy.mkdir(parents=True)
    for each in path.parent.iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    Tokenizer.from_str(json.dumps(document)).save(str(copy / "tokenizer.json"))
    with pytest.raises(TrainingError, match="not a checkpoint of this model"):
        load_parent(parent_recipe.name, tmp_path / "runs")


def test_a_finished_model_keeps_a_share_of_what_it_began_with(translator, data, tmp_path):
    parent, runs, folder = translator
    changed = child(parent, folder, fit={**FIT, "epochs": 2})
    after = train(changed, data, tmp_path).model.state_dict()
    before = load_parent(str(folder), runs).model.state_dict()
    kept = child(parent, folder, init={"keep": 0.25}, fit={**FIT, "epochs": 2})
    mixed = load_trained(kept, tmp_path).model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, weight in mixed.items():
        torch.testing.assert_close(weight, 0.75 * after[name] + 0.25 * before[name])


def test_a_pruned_student_trains_on_and_resumes(translator, data, tmp_path):
    parent_recipe, _, folder = translator
    size = {"n_encoder_layers": 1, "n_decoder_layers": 1}
    layers = {"layers": {"encoder": [1], "decoder": [0]}}
    # All bytes, three marks and room for a few merges.
    words = {"kind": "parent", "vocab_size": 265}
    student = child(parent_recipe, folder, size, layers, tokenizer=words, fit=FIT)
    trained = train(student, data, tmp_path)
    assert trained.model.config.vocab_size == trained.tokenizer.get_vocab_size() == 265
    assert Recipe.model_validate_json((tmp_path / "child" / "recipe.json").read_text()) == student
    again = load_trained(student, tmp_path).model.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in trained.model.state_dict().items())
    manifest = export(student, trained, data, tmp_path / "out")
    assert manifest.quantisation.parity_cosine > 0.98


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": {"kind": "byte-bpe", "vocab_size": 300}}, "'parent' goes with \\[init\\]"),
        ({"init": {"from": "x", "layers": [0]}}, "name those of each stack"),
        ({"budget": {"max_mb": 1}}, "has the other's size"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        child(recipes.translate(), "x", **changes)
