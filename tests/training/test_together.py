"""Several tasks on one trunk: what they share, whose batches come when, and that each serves alone."""

import pytest
import torch

from models.manifest import load_manifest
from models.transformer import Transformer
from tests.training import recipes
from training.commands import run_export
from training.errors import TrainingError
from training.settings import Settings
from training.together import Together, joined_batches
from training.train import members_of, train

PARTS = {"tiny-answer": recipes.answer, "tiny-summarize": recipes.summarize}


@pytest.fixture
def joint(monkeypatch):
    """Sentiment, with answers and summaries on the same trunk."""
    recipe = recipes.sentiment(together=tuple(PARTS))
    monkeypatch.setattr("training.train.load_recipe", lambda name: PARTS[name]())
    monkeypatch.setattr("training.commands.load_recipe", lambda _: recipe)
    return recipe


def test_each_task_is_exported_from_the_same_trunk(joint, data, tmp_path, trunk_package):
    trained = train(joint, data, tmp_path / "runs")
    settings = Settings(data=data, runs=tmp_path / "runs", out=tmp_path / "out")
    run_export("tiny-sentiment", settings)
    folders = {"tiny-sentiment", "tiny-sentiment-tiny-answer", "tiny-sentiment-tiny-summarize"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == folders
    manifests = [load_manifest(tmp_path / "out" / name) for name in sorted(folders)]
    assert [manifest.tasks for manifest in manifests] == [("sentiment",), ("answer",), ("summarize",)]
    seen = {"sentiment/days", "qa/rivers", "summarization/rain", "summarization/marked"}
    assert all({part.name for part in manifest.training_data} == seen for manifest in manifests)
    sentiment, answer, summarize = members_of(trained.model)
    assert sentiment.encoder[0].attn.qkv.weight is answer.encoder[0].attn.qkv.weight
    assert sentiment.encoder[0].attn.qkv.weight is summarize.decoder[0].attn.qkv.weight
    assert sentiment.head.out.weight.shape != answer.head.out.weight.shape


def test_every_head_and_the_trunk_learn(joint, data, tmp_path, trunk_package):
    short = joint.model_copy(update={"name": "short", "fit": joint.fit.model_copy(update={"epochs": 0.01})})
    before = train(short, data, tmp_path).model.state_dict()
    after = train(joint, data, tmp_path).model.state_dict()
    for name in (
        "encoder.0.ffn.up.weight",
        "head.out.weight",
        "others.0.head.out.weight",
        "others.1.head.extract.weight",
    ):
        assert not torch.equal(before[name], after[name]), name


def test_a_shared_weight_counts_once():
    main, other = recipes.sentiment().model, recipes.answer().model
    together = Together(main, [other])
    assert together.n_parameters == Transformer(main).n_parameters + 2 * (main.d_model + 1)
    assert len(dict(together.named_parameters())) == len(dict(Transformer(main).named_parameters())) + 2


def test_what_cannot_share_a_trunk_is_said():
    main = recipes.sentiment().model
    with pytest.raises(TrainingError, match=r"model\.d_ff: tasks on one trunk have the same; 64 and 48 are not"):
        Together(main, [main.model_copy(update={"d_ff": 48})])
    with pytest.raises(TrainingError, match=r"the same layers; \[\('encoder', 2\)\] and \[\('encoder', 1\)\] are not"):
        Together(main, [main.model_copy(update={"n_encoder_layers": 1})])


def test_a_batch_is_of_one_task():
    tasks = [[[0, 1], [2]], [[0], [1], [2], [3]]]
    found = joined_batches(tasks, [0, 3], 1.0, seed=0, epoch=0)
    assert sorted(map(sorted, found)) == [[0, 1], [2], [3], [4], [5], [6]]
    assert found == joined_batches(tasks, [0, 3], 1.0, seed=0, epoch=0)
    even = [joined_batches(tasks, [0, 3], 1e9, seed=0, epoch=epoch) for epoch in range(4)]
    assert all(sum(batch[0] < 3 for batch in epoch) == 3 == sum(batch[0] >= 3 for batch in epoch) for epoch in even)
    assert {batch[0] for epoch in even for batch in epoch} == {0, 2, 3, 4, 5, 6}
