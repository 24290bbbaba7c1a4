"""Pretraining: what each objective hides, checked by hand, and whole runs of each."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from tests.training import recipes
from tests.training.conftest import write_set
from training import train as stage
from training.blocks import BlockBatches, held_out_loss, prepare
from training.commands import run_export, run_training
from training.errors import TrainingError
from training.export import export
from training.pretrain import OBJECTIVES, Denoise, Masked, Prefix
from training.recipe import EvaluateRecipe, Recipe
from training.settings import Settings
from training.tasks import IGNORED
from training.tokenizer import learn_byte_bpe, learn_word_pieces, special_ids
from training.train import load_trained, train

BLOCK = list(range(100, 200))


@pytest.fixture(scope="module")
def pieces():
    return learn_word_pieces(["the river rises in the valley and the rain fell on the day"], 300)


def rng(*seed):
    return np.random.default_rng(seed)


def test_masks_are_eighty_ten_ten(pieces):
    task = Masked(recipes.pretrain("masked", max_tokens=102), pieces)
    task.words = np.arange(100, 200)
    seen = []
    for number in range(300):
        sample = task.sample(BLOCK, rng(number))
        labels, read, whole = np.array(sample.labels), np.array(sample.ids), np.array([task.cls, *BLOCK, task.sep])
        hidden = labels != IGNORED
        assert hidden.sum() == 15
        assert np.array_equal(labels[hidden], whole[hidden])
        assert np.array_equal(read[~hidden], whole[~hidden])
        seen += [
            (token == task.mask, token == label) for token, label in zip(read[hidden], labels[hidden], strict=True)
        ]
    masked, same = np.mean(seen, axis=0)
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1 + 0.1 / 100, abs=0.015)


def test_end_marks_are_never_hidden(pieces):
    task = Masked(recipes.pretrain("masked"), pieces)
    sample = task.sample([task.sep] * 13 + [max(special_ids(pieces)) + 1], rng(0))
    assert [label for label in sample.labels if label != IGNORED] == [max(special_ids(pieces)) + 1]


def test_spans_are_cut_out_and_written():
    tokenizer = learn_byte_bpe(["a"], 400, end_every_text=True, chat=False, n_sentinels=5)
    task = Denoise(recipes.pretrain("denoise", max_tokens=100), tokenizer)
    lengths = []
    for number in range(100):
        sample = task.sample(BLOCK, rng(number))
        source, target = sample.ids[:-1], sample.target[1:-1]
        assert (sample.ids[-1], sample.target[0], sample.target[-1]) == (task.eos, task.bos, task.eos)
        spans, whole = {}, []
        for token in target:
            if token in task.sentinels:
                spans[token] = []
            else:
                spans[[*spans][-1]].append(token)
        for token in source:
            whole += spans.get(token, [token])
        assert whole == BLOCK
        assert [*spans] == task.sentinels
        lengths += map(len, spans.values())
    assert np.mean(lengths) == 3.0
    assert min(lengths) == 1


def test_a_prefix_ends_anywhere_and_writes_the_rest(pieces):
    task = Prefix(recipes.pretrain("prefix", max_tokens=102), pieces)
    ends = set()
    for number in range(50):
        sample = task.sample(BLOCK, rng(number))
        split = sample.prefix - 2
        assert sample.ids == [task.cls, *BLOCK[:split], task.eos, *BLOCK[split:]]
        assert sample.labels == [IGNORED] * (sample.prefix - 1) + [*BLOCK[split:], IGNORED]
        assert sample.types == [0] * sample.prefix + [1] * (100 - split)
        ends.add(split)
    assert len(ends) > 30


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_epoch_hides_anew_and_a_resumed_one_the_same(data, tmp_path, objective):
    recipe = recipes.pretrain(objective)
    runs = []
    for name in ("first", "first", "second"):
        (tmp_path / name).mkdir(exist_ok=True)
        if name == "second":
            shutil.copy(tmp_path / "first" / "tokenizer.json", tmp_path / name)
        make = partial(stage._tokenizer, recipe, tmp_path / name, None)
        blocks = prepare(recipe, data, tmp_path / name, make)[2]
        runs.append([[[blocks[place] for place in batch] for batch in blocks.batches(epoch)] for epoch in range(2)])
    assert runs[0] == runs[1] == runs[2]
    first, second = runs[0]
    assert sum(map(len, first)) == blocks.per_epoch
    assert first != second


@pytest.mark.parametrize("objective", ["masked", "denoise", "prefix"])
def test_a_block_hides_other_tokens_in_another_epoch(data, tmp_path, objective):
    recipe = recipes.pretrain(objective, max_tokens=48)
    blocks = prepare(recipe, data, tmp_path, partial(stage._tokenizer, recipe, tmp_path, None))[2]
    places = range(blocks.per_epoch)
    first, second = ([blocks[epoch * len(blocks) + place] for place in places] for epoch in range(2))
    assert sum(a != b for a, b in zip(first, second, strict=True)) > len(first) / 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pretrains(data, tmp_path, capsys, objective):
    evaluate = [{"path": "text/days", "split": "train"}]
    recipe = recipes.pretrain(objective)
    trained = train(recipe, data, tmp_path)
    assert trained.rows == {"text/days": 12}
    assert "12 texts" in capsys.readouterr().out
    names = set(trained.model.state_dict())
    assert any(name.startswith(("encoder.0.", "decoder.0.")) for name in names)
    again = load_trained(recipe, tmp_path)
    assert all(
        torch.equal(weight, again.model.state_dict()[name]) for name, weight in trained.model.state_dict().items()
    )
    each = EvaluateRecipe.model_validate(evaluate[0])
    found = held_out_loss(trained.model, trained.tokenizer, recipe, each, data)
    assert found == held_out_loss(again.model, again.tokenizer, recipe, each, data)
    assert 0 < found["loss"] < np.log(300) + 1
    assert ("bits per byte" in found) == (objective == "causal")


def test_pretraining_learns(data, tmp_path):
    short, long = (recipes.pretrain("masked", name=f"t-{n}", fit={**recipes.FIT, "epochs": n}) for n in (1, 60))
    each = EvaluateRecipe(path="text/days", split="train")
    losses = [
        held_out_loss(
            train(recipe, data, tmp_path).model, load_trained(recipe, tmp_path).tokenizer, recipe, each, data
        )
        for recipe in (short, long)
    ]
    assert losses[1]["loss"] < 0.7 * losses[0]["loss"]


def test_sets_are_drawn_by_share_and_temperature(data, tmp_path):
    write_set(
        tmp_path, "text/many", [{"text": f"text number {n} of very many, all of them different"} for n in range(99)]
    )
    write_set(tmp_path, "text/few", [{"text": f"only a few {n}, they come again and again"} for n in range(9)])
    sets = [{"path": path, "licence": "CC0", "where": "here"} for path in ("text/many", "text/few")]
    counts = {}
    for temperature in (1.0, 1e6):
        run = tmp_path / str(temperature)
        run.mkdir()
        recipe = recipes.pretrain("causal", data=sets, mix={"temperature": temperature})
        blocks = prepare(recipe, tmp_path, run, partial(stage._tokenizer, recipe, run, None))[2]
        sizes = [len(starts) for starts in blocks._starts]
        places = [place % sum(sizes) for batch in blocks.batches(0) for place in batch]
        counts[temperature] = [sum(place < sizes[0] for place in places), sum(place >= sizes[0] for place in places)]
        assert len(places) == pytest.approx(sum(sizes), abs=1)
    assert counts[1.0] == sizes
    assert counts[1e6][0] == pytest.approx(counts[1e6][1], abs=1)


def test_a_pretraining_run_is_not_exported(data, tmp_path, capsys, monkeypatch):
    write_set(tmp_path, "text/short", [{"title": "too short"}])
    part = {"path": str(tmp_path / "text" / "short"), "columns": {"text": "title"}, "split": "train"}
    monkeypatch.setattr("training.commands.load_recipe", lambda _: recipes.pretrain(evaluate=[part]))
    settings = Settings(data=data, runs=tmp_path / "runs", out=tmp_path / "out")
    with pytest.raises(TrainingError, match="fills no block of 16 tokens"):
        run_training("tiny-pretrain", settings)
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr("training.commands.load_recipe", lambda _: recipes.pretrain())
    run_training("tiny-pretrain", settings)
    assert (
        'no model to serve yet; a fine-tuning recipe starts from it with [init] from = "tiny'
        in capsys.readouterr().out
    )
    with pytest.raises(TrainingError, match="a pretraining run is no model to serve"):
        run_export("tiny-pretrain", settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": None}, "objective: goes with task = 'pretrain'"),
        ({"objective": "masked"}, "model: masked pretraining wants architecture encoder"),
        (
            {"task": "generate", "objective": None, "export": {"max_input_tokens": 0}},
            "export.max_input_tokens: Field required",
        ),
    ],
)
def test_a_recipe_says_what_it_is_for(changes, said):
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({**recipes.pretrain().model_dump(), **changes})


def test_a_corpus_without_text_is_said(tmp_path):
    write_set(tmp_path, "text/days", [{"text": " "}])
    with pytest.raises(TrainingError, match="no text is left to train on"):
        train(recipes.pretrain(), tmp_path, tmp_path)


def test_a_tokenizer_of_another_language_is_said(data, tmp_path):
    run = tmp_path / "tiny-pretrain"
    run.mkdir()
    learn_word_pieces(["der Fluss"], 300).save(str(run / "tokenizer.json"))
    write_set(tmp_path, "text/days", [{"text": f"第{n}天下雨了，没有人在意。" * 9} for n in range(9)])
    with pytest.raises(TrainingError, match=r"the tokenizer does not know \d+% of the words of its data"):
        train(recipes.pretrain("masked"), tmp_path, tmp_path)


def test_batches_of_blocks_are_a_sequence():
    batches = BlockBatches(np.arange(5), 2)
    assert list(batches) == [[0, 1], [2, 3], [4]]


FINE_TUNED = {
    "causal": (recipes.generate, {}),
    "denoise": (recipes.translate, {}),
    "masked": (recipes.sentiment, {"head": "classify", "n_labels": 3}),
    "prefix": (recipes.summarize, {"extract_head": True}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_task_starts_from_a_pretraining_run(data, tmp_path, objective):
    pretrained = train(recipes.pretrain(objective), data, tmp_path / "runs").model.state_dict()
    make, head = FINE_TUNED[objective]
    document = {
        **make().model_dump(),
        "model": {"vocab_size": 300, **recipes.PRETRAINED[objective], **head},
        "trunk": None,
        "init": {"from": "tiny-pretrain"},
        "tokenizer": {"kind": "parent", "vocab_size": 300},
    }
    recipe = Recipe.model_validate(document)
    still = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"learning_rate": 0.0, "epochs": 0.01})})
    trained = train(still, data, tmp_path / "runs")
    weights = trained.model.state_dict()
    layers = [name for name in pretrained if name.startswith(("encoder.", "decoder."))]
    assert layers
    assert all(torch.equal(weights[name], pretrained[name]) for name in layers)
    manifest = export(still, trained, data, tmp_path / "out")
    assert manifest.parent.name == "tiny-pretrain"
