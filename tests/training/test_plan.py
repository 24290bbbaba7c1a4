"""Plans keep their budgets, or say what would; their recipes train."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training import recipes
from tests.training.test_frontier import manifest, variant
from tests.training.test_report import stage
from training import pace
from training.budget import count_parameters, fitting
from training.commands import run_plan
from training.errors import TrainingError
from training.flops import TextSize, forward_flops
from training.pace import Speed, Texts, read_texts
from training.plan import (
    MOST_EPOCHS,
    PROPORTIONS,
    Budget,
    allowed_tokens,
    as_text,
    best_shape,
    joules_per_query,
    known_stages,
    make_plan,
    planned,
    write_recipe,
)
from training.recipe import load_recipe
from training.records import Progress, write_stage
from training.scaling import Scaling
from training.settings import Settings
from training.train import load_rows, train

SPEED = Speed(1000.0, 0.01, "estimated", 10.0, 1, 0.0, "float32")
TEXTS = Texts(task=None, samples=(), size=TextSize(10, 10, 10), tokens=20.0, epoch_tokens=1e6)  # type: ignore[arg-type]
FROM_NOTHING = recipes.translate()
FROM_TRUNK = recipes.sentiment()
SMALLEST_MB = count_parameters(fitting(FROM_NOTHING, 10.0)[0]) / 1e6


@given(st.floats(SMALLEST_MB, 2.0))
def test_shapes_fit_and_the_last_is_the_largest(max_mb):
    shapes = fitting(FROM_NOTHING, max_mb)
    sizes = [count_parameters(shape) for shape in shapes]
    assert sizes == sorted(sizes) and sizes[-1] <= max_mb * 1e6
    assert {shape.head_dim for shape in shapes} == {FROM_NOTHING.model.head_dim}


def test_a_trunk_keeps_its_width():
    shapes = fitting(FROM_TRUNK, 10.0)
    assert [shape.n_encoder_layers for shape in shapes] == [1, 2]
    assert {shape.d_model for shape in shapes} == {FROM_TRUNK.model.d_model}
    assert fitting(FROM_TRUNK, None) == [FROM_TRUNK.model]


def test_where_the_vocabulary_leaves_no_room_it_is_cut():
    whole = FROM_TRUNK.model
    tight = count_parameters(whole.model_copy(update={"n_encoder_layers": 1})) * 0.9 / 1e6
    assert fitting(FROM_TRUNK, tight)[-1].vocab_size < whole.vocab_size


def test_a_size_that_nothing_has_names_the_smallest():
    with pytest.raises(TrainingError, match=r"no sentiment model of 0.001 MB: the smallest has 0.0\d MB"):
        fitting(FROM_TRUNK, 0.001)


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (Budget(), 2e6),  # the recipe's two epochs
        (Budget(hours=0.1), 360_000),
        (Budget(max_joules=500.0), 50_000),
        (Budget(hours=0.1, max_joules=500.0), 50_000),
        (Budget(hours=1000.0), MOST_EPOCHS * 1e6),
    ],
)
def test_tokens_are_what_the_tighter_budget_leaves(budget, tokens):
    assert allowed_tokens(FROM_NOTHING, SPEED, TEXTS, budget) == pytest.approx(tokens)


def test_a_budget_too_small_to_train_says_what_would_do():
    least = 100 * FROM_NOTHING.fit.batch_tokens
    said = f"--hours {least / 3.6e6:.2g} and --max-joules {least / 100:.0f} would do"
    with pytest.raises(TrainingError, match=said):
        allowed_tokens(FROM_NOTHING, SPEED, TEXTS, Budget(hours=0.001))
    blind = replace(SPEED, joules_per_token=None)
    with pytest.raises(TrainingError, match=r"--hours \S+ would do"):
        allowed_tokens(FROM_NOTHING, blind, TEXTS, Budget(hours=0.001))
    with pytest.raises(TrainingError, match="give --hours instead"):
        allowed_tokens(FROM_NOTHING, blind, TEXTS, Budget(max_joules=1e6))


def test_the_best_shape_follows_the_fit():
    shapes = fitting(FROM_NOTHING, 1.0)
    assert len(shapes) > 2
    by_size = Scaling(0.0, a=0.5, b=0.0, stages=4, error=0.0)
    assert best_shape(shapes, by_size, SPEED, TEXTS, Budget(hours=0.1)) == shapes[-1]
    by_tokens = Scaling(0.0, a=0.0, b=0.5, stages=4, error=0.0)
    assert best_shape(shapes, by_tokens, SPEED, TEXTS, Budget(hours=0.01)) == shapes[0]


def test_joules_a_query_are_in_proportion_to_computing():
    small, size = FROM_TRUNK.model, TextSize(10)
    large = small.model_copy(update={"n_encoder_layers": 4})
    factor = forward_flops(large, size) / forward_flops(small, size)
    measured = manifest("measured", variant("calibrated", 8, 60.0, 0.2), variant("none", 32, 60.0, 5.0), config=small)
    found, models = joules_per_query(FROM_TRUNK, large, size, [measured, manifest("new", config=small)])
    assert found == pytest.approx(0.2 * factor) and models == ("measured",)
    assert joules_per_query(FROM_TRUNK, large, size, []) == (None, ())


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        (recipes.translate(), ("written", "words")),
        (recipes.generate(), ("words",)),
        (recipes.sentiment(), ()),
        (recipes.answer(), ()),
        (recipes.summarize(), ("words",)),
    ],
    ids=lambda value: getattr(value, "task", ""),
)
def test_texts_are_as_long_as_the_model_reads_them(data, trunk_package, recipe, fields):
    rows = [row for _, part in load_rows(recipe, data) for row in part]
    texts = read_texts(recipe, recipe.model.vocab_size, rows)
    assert texts.size.read > 0
    assert {name for name in ("written", "words") if getattr(texts.size, name)} == set(fields)
    assert texts.epoch_tokens == pytest.approx(sum(sample.length for sample in texts.samples))


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_the_faster_precision_is_measured(data, monkeypatch, faster):
    recipe = recipes.translate()
    rows = [row for _, part in load_rows(recipe, data) for row in part]
    asked = []

    def fit_model(model, fit, work, run):
        steps = round(fit.epochs * len(work.epoch_batches(0)))
        asked.append((fit.precision, steps))
        seconds = steps * (0.5 if fit.precision == faster else 1.0)
        return Progress(step=steps, tokens=100 * steps, elapsed_s=seconds, joules=steps, quality="estimated")

    monkeypatch.setattr(pace, "fit_model", fit_model)
    texts = read_texts(recipe, recipe.model.vocab_size, rows)
    speed = pace.measure(recipe, recipe.model, texts)
    assert asked[-1] == (faster, 20) and speed.precision == faster
    assert (speed.tokens_per_s, speed.joules_per_token, speed.seconds) == (200.0, 0.01, 10.0)
    assert speed.watts == pytest.approx(2.0)


def test_a_plan_is_measured_told_and_trained(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pace, "MEASURED_S", 0.05)
    base, budget = recipes.translate(), Budget(max_mb=0.5)
    plan = make_plan(base, budget, data, tmp_path / "runs", tmp_path / "out", "planned")
    assert plan.megabytes <= 0.5 and plan.parameters == count_parameters(plan.recipe.model)
    assert plan.tokens == pytest.approx(base.fit.epochs * plan.epoch_tokens)
    assert plan.recipe.fit.precision == plan.speed.precision
    text = as_text(plan, budget)
    assert f"{plan.parameters:,}, about {plan.megabytes:.1f} MB as exported of 0.5 MB" in text
    assert "not predicted: 4 runs on the same data are needed, and there are 0" in text
    assert "not predicted: no model of the task was measured" in text
    path = tmp_path / "planned.toml"
    write_recipe(plan.recipe, path)
    assert load_recipe(str(path)) == plan.recipe
    trained = train(load_recipe(str(path)), data, tmp_path / "runs")
    assert trained.model.config.d_model == plan.recipe.model.d_model
    assert [each.name for each in known_stages(tmp_path / "runs", tmp_path / "out")] == ["planned"]


def test_runs_before_it_predict_the_loss(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pace, "MEASURED_S", 0.05)
    base = recipes.translate()
    for number, (parameters, tokens) in enumerate([(1e4, 1e5), (1e4, 1e6), (1e5, 1e5), (1e6, 1e6)]):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        loss = 100 * parameters**-0.1 * tokens**-0.2
        shape = {"parameters": int(parameters), "tokens": int(tokens), "loss": loss}
        write_stage(run, stage(run.name, data=("translation/numbers",), **shape))
    budget = Budget(max_mb=0.2, hours=10.0)
    plan = make_plan(base, budget, data, tmp_path, tmp_path / "out", "planned")
    assert plan.loss == pytest.approx(100 * plan.parameters**-0.1 * plan.tokens**-0.2, rel=1e-3)
    assert "parameters^-0.1 tokens^-0.2, fitted to 4 runs" in as_text(plan, budget)


def test_what_is_asked_wrongly_is_said(tmp_path, data):
    with pytest.raises(TrainingError, match="--task is missing: one of translate"):
        run_plan(None, Settings(data=data))
    with pytest.raises(TrainingError, match="cannot be called 'A b'"):
        run_plan(tmp_path / "A b.toml", Settings(data=data, task="sentiment"))
    with pytest.raises(TrainingError, match="no such file"):
        run_plan(None, Settings(data=tmp_path, task="sentiment"))
    with pytest.raises(TrainingError, match="cannot be written"):
        write_recipe(recipes.translate(), tmp_path / "gone" / "planned.toml")


@pytest.mark.parametrize("task", PROPORTIONS)
def test_every_task_has_proportions_that_can_change(task):
    base = load_recipe(PROPORTIONS[task])
    assert base.task == task and base.init is None
    shapes = fitting(base, 1000.0)
    assert len(shapes) > 1
    # What is proposed is a recipe that can be read, whose model still gives vectors where its proportions do.
    assert [planned(base, shape, "float32", 1.0, "planned").model for shape in shapes] == shapes
    assert all(bool(shape.vector_layers) == bool(base.model.vector_layers) for shape in shapes)
