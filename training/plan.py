"""A model and a run that fit budgets of size, time and energy. Knows nothing of what they will be good for beyond what
runs before them have shown."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from models.config import TransformerConfig
from models.manifest import ArtefactError, Manifest, Stage, Task, read_manifest
from training.budget import count_parameters, fitting
from training.errors import TrainingError, writing
from training.flops import TextSize, forward_flops, training_flops
from training.pace import Speed, Texts, measure, read_texts
from training.recipe import BudgetRecipe, Precision, Recipe
from training.records import gco2e, read_lineage
from training.report import figure, scaled
from training.scaling import Scaling, fit_scaling
from training.train import load_rows

PROPORTIONS: Mapping[Task, str] = {
    "translate": "translate-en-de-teacher",
    "generate": "generate-en",
    "answer": "answer-en",
    "sentiment": "sentiment-en-base",
    "summarize": "summarize-en-dialogues",
}
"""The recipe that a task's plan starts from."""
LEAST_STEPS = 100
"""Fewer are no training: the learning rate has hardly risen."""
MOST_EPOCHS = 4.0
"""More of the same rows hardly help (Muennighoff et al. 2023)."""


@dataclass(frozen=True)
class Budget:
    """What a run may take; None is no limit."""

    max_mb: float | None = None
    max_joules: float | None = None
    hours: float | None = None

    def tokens(self, speed: Speed, factor: float = 1.0) -> float:
        """How many tokens time and joules leave room for, at ``factor`` times the speed; infinite without a limit."""
        by_time = math.inf if self.hours is None else self.hours * 3600 * speed.tokens_per_s
        known = self.max_joules is not None and speed.joules_per_token is not None
        by_energy = self.max_joules / speed.joules_per_token if known else math.inf  # type: ignore[operator]
        return factor * min(by_time, by_energy)


@dataclass(frozen=True)
class Plan:
    """A proposal: the recipe, and what is expected of it."""

    recipe: Recipe
    parameters: int
    megabytes: float
    flops_per_token: float
    """Of training."""
    speed: Speed
    tokens: float
    epoch_tokens: float
    loss: float | None
    scaling: Scaling | str
    """The fit, or why there is none."""
    joules_per_query: float | None
    measured_on: tuple[str, ...]
    """Models whose joules a query that was told from."""

    @property
    def seconds(self) -> float:
        """Of training."""
        return self.tokens / self.speed.tokens_per_s

    @property
    def joules(self) -> float | None:
        """Of training."""
        each = self.speed.joules_per_token
        return None if each is None else self.tokens * each


def make_plan(base: Recipe, budget: Budget, data: Path, runs: Path, out: Path, name: str) -> Plan:
    """Propose a model in the proportions of ``base`` within ``budget``, trained on the same sets under ``data``.

    ``runs`` and ``out`` hold what was trained before. Raises ``TrainingError`` where nothing fits, with what would.
    """
    rows = [row for _, part in load_rows(base, data) for row in part]
    stages, models = known_stages(runs, out), known_models(base.served_task, out)
    scaling = fit_scaling(stages, [part.title for part in base.data])
    shapes = fitting(base, budget.max_mb)
    texts = read_texts(base, shapes[-1].vocab_size, rows)
    speed = measure(base, shapes[-1], texts)
    config = shapes[-1]
    if isinstance(scaling, Scaling) and (budget.hours or budget.max_joules):
        config = best_shape(shapes, scaling, speed, texts, budget)
        if config != shapes[-1]:
            speed = measure(base, config, texts)
    tokens = allowed_tokens(base, speed, texts, budget)
    per_query, measured_on = joules_per_query(base, config, texts.size, models)
    parameters = count_parameters(config)
    return Plan(
        recipe=planned(base, config, speed.precision, tokens / texts.epoch_tokens, name),
        parameters=parameters,
        megabytes=parameters * base.export.bytes_per_parameter / 1e6,
        flops_per_token=training_flops(config, texts.size) / texts.tokens,
        speed=speed,
        tokens=tokens,
        epoch_tokens=texts.epoch_tokens,
        loss=scaling.loss(parameters, tokens) if isinstance(scaling, Scaling) else None,
        scaling=scaling,
        joules_per_query=per_query,
        measured_on=measured_on,
    )


def allowed_tokens(base: Recipe, speed: Speed, texts: Texts, budget: Budget) -> float:
    """Tokens that the budget allows, but no more than are worth it; without one, the recipe's own.

    Raises ``TrainingError`` where they are too few to train, or joules are limited and nobody counts them.
    """
    if budget.max_joules is not None and speed.joules_per_token is None:
        raise TrainingError("joules have neither a meter nor an estimate here (`wattle meters`): give --hours instead")
    allowed, least = budget.tokens(speed), LEAST_STEPS * base.fit.batch_tokens
    if allowed == math.inf:
        return base.fit.epochs * texts.epoch_tokens
    if allowed < least:
        enough = f"--hours {least / speed.tokens_per_s / 3600:.2g}"
        if speed.joules_per_token is not None:
            enough += f" and --max-joules {least * speed.joules_per_token:.0f}"
        raise TrainingError(
            f"the budget allows {allowed:,.0f} tokens, and the least to train with is {LEAST_STEPS} steps of "
            f"{base.fit.batch_tokens:,}: {enough} would do, or a smaller --max-mb"
        )
    return min(allowed, MOST_EPOCHS * texts.epoch_tokens)


def best_shape(
    shapes: Sequence[TransformerConfig], scaling: Scaling, speed: Speed, texts: Texts, budget: Budget
) -> TransformerConfig:
    """The shape of the least expected loss, each with as many tokens as its computing leaves time or joules for.

    ``speed`` is of the last of ``shapes``; others are taken to compute as fast.
    """
    largest = training_flops(shapes[-1], texts.size)

    def loss(config: TransformerConfig) -> float:
        allowed = budget.tokens(speed, largest / training_flops(config, texts.size))
        return scaling.loss(count_parameters(config), min(allowed, MOST_EPOCHS * texts.epoch_tokens))

    return min(shapes, key=loss)


def known_stages(runs: Path, out: Path) -> list[Stage]:
    """Every stage that has ended: of the runs, and of the lineage of exported models."""
    stages = [stage for run in _folders(runs) for stage in read_lineage(run)]
    return list(dict.fromkeys([*stages, *(stage for model in _manifests(out) for stage in model.lineage)]))


def known_models(task: Task, out: Path) -> list[Manifest]:
    """The exported models of a task."""
    return [model for model in _manifests(out) if task in model.tasks]


def _manifests(out: Path) -> Iterator[Manifest]:
    for folder in _folders(out):
        try:
            yield read_manifest(folder)
        except ArtefactError:
            continue  # no model


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def joules_per_query(
    base: Recipe, config: TransformerConfig, size: TextSize, models: Sequence[Manifest]
) -> tuple[float | None, tuple[str, ...]]:
    """What a query should cost, and the models that say so; None without any.

    In proportion to what is computed, by least squares over the models that were measured stored as the recipe stores:
    they are all taken to read texts of this size.
    """
    measured = [(model, model.stored_as(base.export.scheme, base.export.bits_per_weight)) for model in models]
    points = [
        (model.name, forward_flops(model.config, size), variant.active_j_per_query)
        for model, variant in measured
        if variant is not None and variant.active_j_per_query is not None
    ]
    if not points:
        return None, ()
    slope = sum(flops * joules for _, flops, joules in points) / sum(flops * flops for _, flops, _ in points)
    return slope * forward_flops(config, size), tuple(name for name, *_ in points)


def planned(base: Recipe, config: TransformerConfig, precision: Precision, epochs: float, name: str) -> Recipe:
    """The recipe of the proposal."""
    return Recipe.model_validate(
        {
            **base.model_dump(),
            "name": name,
            "model": config.model_dump(),
            "budget": BudgetRecipe().model_dump(),
            "tokenizer": {**base.tokenizer.model_dump(), "vocab_size": config.vocab_size},
            "fit": {**base.fit.model_dump(), "epochs": float(f"{epochs:.3g}"), "precision": precision},
        }
    )


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as `wattle train` reads it. Raises ``TrainingError``."""
    document = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    with writing(path):
        path.write_text(tomli_w.dumps(document), encoding="utf-8")


def as_text(plan: Plan, budget: Budget) -> str:
    """The plan as lines for a person."""
    lines = {
        "shape": _shape(plan.recipe.model),
        "parameters": f"{plan.parameters:,}, about {plan.megabytes:.1f} MB as exported" + _of(budget.max_mb, "MB"),
        "starts from": plan.recipe.trunk.name if plan.recipe.trunk else "random weights",
        "computing": f"{scaled(plan.flops_per_token)}FLOPs a token of training (forward and twice that back), "
        f"{scaled(plan.flops_per_token * plan.tokens)}FLOPs in all",
        "measured": _measured(plan),
        "tokens": f"{plan.tokens:,.0f}, {plan.tokens / plan.epoch_tokens:.3g} epochs, "
        f"{plan.tokens / plan.parameters:.2g} for each parameter",
        "time": f"{plan.seconds / 3600:.2g} hours" + _of(budget.hours, "hours"),
        "energy": _energy(plan.joules) + _of(budget.max_joules, "J"),
        "loss": _loss(plan),
        "query": _query(plan),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _of(limit: float | None, unit: str) -> str:
    return "" if limit is None else f" of {limit:,g} {unit}"


def _shape(config: TransformerConfig) -> str:
    stacks = ((config.n_encoder_layers, "encoder"), (config.n_decoder_layers, "decoder"))
    layers = " and ".join(f"{count} {kind}" for count, kind in stacks if count)
    return (
        f"{config.architecture}, {layers} layers, d_model {config.d_model}, {config.n_heads} heads, "
        f"d_ff {config.d_ff}, {config.vocab_size:,} words"
    )


def _measured(plan: Plan) -> str:
    speed = plan.speed
    energy = "joules unavailable"
    if speed.joules_per_token is not None:
        energy = f"{speed.joules_per_token:.3g} J/token, {speed.watts:.3g} W ({speed.quality})"
    rate = f"{speed.tokens_per_s:,.0f} tokens/s, {scaled(plan.flops_per_token * speed.tokens_per_s)}FLOP/s"
    others = "" if speed.foreign_cores is None else f" while others kept {speed.foreign_cores:.2g} cores busy"
    return f"{rate}, {energy}, in {speed.seconds:.0f} s of {speed.precision} with --threads {speed.threads}{others}"


def _energy(joules: float | None) -> str:
    return (
        "unavailable"
        if joules is None
        else f"{joules:,.0f} J, {figure(gco2e(joules))} gCO2e at the world's average grid"
    )


def _loss(plan: Plan) -> str:
    if not isinstance(plan.scaling, Scaling) or plan.loss is None:
        return f"not predicted: {plan.scaling}"
    fit = plan.scaling
    return (
        f"{plan.loss:.3g} expected, within {100 * math.expm1(fit.error):.0f}%: {math.exp(fit.constant):.3g} "
        f"parameters^-{fit.a:.3g} tokens^-{fit.b:.3g}, fitted to {fit.stages} runs"
    )


def _query(plan: Plan) -> str:
    if plan.joules_per_query is None:
        return "not predicted: no model of the task was measured stored like this (`wattle quantise --write`)"
    return f"{plan.joules_per_query:.2g} J, in proportion to what {', '.join(plan.measured_on)} computes and costs"
