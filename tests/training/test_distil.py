"""A student that is its teacher has nothing to learn from it; one that is not, has; and losses are their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from models.manifest import load_manifest
from models.transformer import Transformer
from tests.tiny import tiny_config, tiny_transformer, write_tiny
from tests.training import recipes
from training.distil import Watched, reading_as, relation_loss, soft_cross_entropy, with_teacher
from training.distributed import Execution
from training.errors import TrainingError
from training.export import export
from training.parents import ParentModel, load_parent
from training.recipe import DistilRecipe
from training.tasks import TASKS, collate
from training.tokenizer import prune
from training.train import load_rows, train
from training.trunk import trunk_tokenizer


def brute_divergence(teacher, student):
    """The sum of p log(p / q) over two lists of numbers, softmaxed."""
    p, q = ([math.exp(each) for each in numbers] for numbers in (teacher, student))
    p, q = ([each / sum(numbers) for each in numbers] for numbers in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=6), st.floats(0.5, 4))
def test_soft_cross_entropy_is_its_formula(pairs, temperature):
    student, teacher = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    found = soft_cross_entropy(student[None], teacher[None], temperature).item()
    soft = [[each / temperature for each in numbers.tolist()] for numbers in (teacher, student)]
    assert found == pytest.approx(temperature**2 * brute_divergence(*soft), rel=1e-3, abs=1e-4)
    assert found >= -1e-5
    assert soft_cross_entropy(teacher[None], teacher[None], temperature).item() == pytest.approx(0, abs=1e-6)


def test_what_is_ruled_out_adds_nothing():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[0.0, -torch.inf, 0.5]]), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(4 * brute_divergence([0, 0.25], [0.5, 1.0]), rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_relations_are_their_formula_whatever_the_widths():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 3, 4, requires_grad=True), torch.randn(3, 2, 3, 8)
    lengths, heads = [3, 2], 2
    real = torch.arange(3) < torch.tensor(lengths)[:, None]
    loss = relation_loss(student, teacher, real, heads)
    wanted = 0.0
    for sort in range(3):
        for row, length in enumerate(lengths):
            for head in range(heads):
                cut = [x[sort, row, :length].view(length, heads, -1)[:, head] for x in (teacher, student.detach())]
                scores = [(x @ x.T / math.sqrt(x.size(1))).tolist() for x in cut]
                wanted += sum(brute_divergence(*pair) for pair in zip(*scores, strict=True)) / (3 * heads)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad[:, 1, 2] == 0).all(), "padding learns nothing"
    assert (student.grad[:, 1, :2] != 0).any()
    assert relation_loss(teacher, teacher, real, heads).item() == pytest.approx(0, abs=1e-6)


def test_relations_are_exact_in_mixed_precision():
    student, teacher = torch.randn(2, 3, 1, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    real = torch.ones(1, 5, dtype=torch.bool)
    exact = relation_loss(student, teacher, real, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(relation_loss(student, teacher, real, 2), exact)


KINDS = ["sentiment", "answer", "translate", "summarize", "generate"]


def taught(kind, data, trunk_package, tmp_path, **distil):
    """A trained teacher, its task wrapped, and a batch."""
    recipe = getattr(recipes, kind)()
    trained = train(recipe, data, tmp_path)
    teacher = ParentModel(recipe.name, "CC0", recipe.labels, trained.model, trained.tokenizer, ())
    task = TASKS[kind](recipe, trained.tokenizer)
    samples = [sample for _, rows in load_rows(recipe, data) for row in rows for sample in task.samples(row)]
    settings = DistilRecipe(teacher=recipe.name, kinds=("logits", "relations"), relation_heads=4, **distil)
    student = Transformer(trained.model.config)
    wrapped = with_teacher(task, student, trained.tokenizer, teacher, settings, recipe.labels)
    return trained.model, student, wrapped, collate(samples[:4], 0), teacher


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(data, trunk_package, tmp_path, kind):
    same, other, task, batch, _ = taught(kind, data, trunk_package, tmp_path, weight=0.75)
    own, counts = task.task.loss(same, batch), task.count(batch)
    *hard, logits, relations = task.loss(same, batch)
    assert len(counts) == len(hard) + 2
    assert all(count > 0 for count in counts[-2:])
    assert [part.item() for part in hard] == pytest.approx([0.25 * part.item() for part in own])
    assert logits.item() == pytest.approx(0, abs=1e-4)
    assert relations.item() == pytest.approx(0, abs=1e-4)

    *_, logits, relations = task.loss(other, batch)
    assert logits.item() > 0
    assert relations.item() > 0
    (logits + relations).backward()
    stack = other.encoder if other.config.has_encoder else other.decoder
    assert all(layer.attn.qkv.weight.grad.abs().sum() > 0 for layer in stack)
    assert all(weight.grad is None for weight in task.teacher.parameters())


def test_a_step_is_the_same_in_however_many_batches(data, trunk_package, tmp_path):
    _, student, task, batch, _ = taught("answer", data, trunk_package, tmp_path)
    whole = task.loss(student, batch)
    halves = [
        task.loss(student, {name: part[rows] for name, part in batch.items()}) for rows in (slice(2), slice(2, 4))
    ]
    for one, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert one.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-4)


def test_a_teacher_reads_a_pruned_student(trunk_package):
    tokenizer = trunk_tokenizer(trunk_package[1])
    config = tiny_config("bert-span", vocab_size=tokenizer.get_vocab_size())
    teacher = ParentModel("teacher", "CC0", (), tiny_transformer(config), tokenizer, ())
    pruned, kept = prune(tokenizer, ["a fine day"], 90, mask_handles=False)
    model = reading_as(teacher, pruned)
    ids = torch.tensor([[2, 20, 30, 3]])
    lengths = torch.tensor([4])
    theirs = teacher.model.encode(torch.from_numpy(kept)[ids], lengths)
    assert torch.equal(model.encode(ids, lengths), theirs)
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("changes", "distil", "said"),
    [
        ({"n_labels": 2}, {}, "model.n_labels: the teacher tiny-classify has 3, the recipe 2"),
        ({}, {"kinds": ("relations",), "relation_heads": 5}, "relation_heads: 5 do not divide d_model 32"),
        ({}, {"layer": 2}, "distil.layer: the teacher tiny-classify has 2 layers, counted from 0"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, changes, distil, said):
    write_tiny(tmp_path / "judge", "classify")
    teacher = load_parent(str(tmp_path / "judge"), tmp_path)
    student = Transformer(teacher.model.config.model_copy(update=changes))
    with pytest.raises(TrainingError, match=said):
        with_teacher(None, student, teacher.tokenizer, teacher, DistilRecipe(teacher="x", **distil), teacher.labels)


def test_labels_in_another_order_are_other_logits(tmp_path):
    write_tiny(tmp_path / "judge", "classify")
    teacher = load_parent(str(tmp_path / "judge"), tmp_path)
    with pytest.raises(TrainingError, match=r"labels: the teacher tiny-classify has .*; name the same"):
        with_teacher(None, teacher.model, teacher.tokenizer, teacher, DistilRecipe(teacher="x"), teacher.labels[::-1])


def test_a_tokenizer_that_does_not_match_is_said(tmp_path):
    for kind in ("classify", "bert-span"):
        write_tiny(tmp_path / kind, kind)
    other = Tokenizer.from_file(str(tmp_path / "bert-span" / "tokenizer.json"))
    with pytest.raises(TrainingError, match=r"the teacher tiny-classify lacks 89 of the student's 126 tokens"):
        reading_as(load_parent(str(tmp_path / "classify"), tmp_path), other)


def test_nothing_stays_on_a_model_that_was_watched(tmp_path):
    write_tiny(tmp_path / "judge", "classify")
    model = load_parent(str(tmp_path / "judge"), tmp_path).model
    layer = model.encoder[-1].attn.qkv
    with Watched(model, -1) as watched:
        logits = watched.label_logits(watched.encode(torch.tensor([[4, 5]]), torch.tensor([2])), torch.tensor([2]))
    assert watched.logits is logits
    assert watched.qkv.shape == (3, 1, 2, 32)
    assert not layer._forward_hooks


def test_a_teacher_of_no_weight_changes_nothing_that_is_learned(data, trunk_package, tmp_path):
    alone = recipes.sentiment(name="alone")
    beside = recipes.sentiment(name="beside", distil={"teacher": "alone", "weight": 0.0})
    wanted, found = (train(each, data, tmp_path) for each in (alone, beside))
    assert wanted.progress.loss > 0
    assert found.progress.loss == pytest.approx(wanted.progress.loss)
    for one, other in zip(wanted.model.parameters(), found.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_relations_of_compiled_layers_are_refused(tmp_path):
    recipe = recipes.sentiment(distil={"teacher": "alone", "kinds": ["relations"]})
    with pytest.raises(TrainingError, match="where compile hides them"):
        train(recipe, tmp_path, tmp_path, Execution(compile=True))


@pytest.mark.parametrize("whole", ["run", "folder"])
def test_a_student_is_trained_beside_its_teacher_and_exported(data, trunk_package, tmp_path, whole):
    teacher = recipes.sentiment(name="teacher")
    export(teacher, train(teacher, data, tmp_path / "runs"), data, tmp_path / "out")
    source = "teacher" if whole == "run" else str(tmp_path / "out" / "teacher")
    document = recipes.sentiment(name="student").model_dump()
    document["model"] |= {"n_encoder_layers": 1}
    student = type(teacher).model_validate(
        document
        | {
            "trunk": None,
            "init": {"from": source, "layers": [1]},
            "tokenizer": {"kind": "parent", "vocab_size": 200},
            "distil": {"teacher": source, "kinds": ["logits", "relations"], "relation_heads": 2},
        }
    )
    trained = train(student, data, tmp_path / "runs")
    manifest = export(student, trained, data, tmp_path / "out")
    assert (manifest.parent.name, manifest.parent.relation) == ("teacher", "distilled")
    assert np.isfinite(trained.progress.loss)
    assert load_manifest(tmp_path / "out" / "student") == manifest
