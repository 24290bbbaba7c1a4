"""What ``wattle train``, ``export``, ``confidence``, ``evaluate`` and ``import`` do, stage after stage."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.manifest import ArtefactError, Manifest, Score, load_manifest, write_manifest
from training.card import write_card
from training.errors import TrainingError
from training.evaluate import Evaluation, evaluate, fit_confidence
from training.export import export
from training.importing import import_model
from training.knowledge import NEUTRAL, Ask
from training.quantise import Serve, variants
from training.recipe import BudgetRecipe, Recipe, Storage, load_recipe
from training.search_speed import search_speed
from training.settings import Settings
from training.train import load_rows, load_trained, train


def _recipe(name: str, settings: Settings) -> Recipe:
    """The recipe, with the budget of the command line over its own."""
    recipe = load_recipe(name)
    if settings.max_parameters is None and settings.max_mb is None:
        return recipe
    budget = BudgetRecipe(max_parameters=settings.max_parameters, max_mb=settings.max_mb)
    try:
        return Recipe.model_validate({**recipe.model_dump(), "budget": budget.model_dump()})
    except ValueError as error:
        raise TrainingError(f"{recipe.name}: {error}") from error


def run_training(name: str, settings: Settings) -> None:
    """Train and export; a run that was interrupted goes on, one that has ended is only exported."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    recipe = _recipe(name, settings)
    train(recipe, settings.data, settings.runs)
    run_export(name, settings)


def run_export(name: str, settings: Settings) -> None:
    """Export a finished run."""
    recipe = _recipe(name, settings)
    _print_written(export(recipe, load_trained(recipe, settings.runs), settings.data, settings.out), settings)


def run_import(source: str, settings: Settings) -> None:
    """Import a model of the transformers library."""
    manifest = import_model(
        source,
        settings.out,
        name=settings.name,
        how=_storage(settings),
        max_positions=settings.max_positions,
        source_language=settings.source_language,
        target_language=settings.target_language,
    )
    _print_written(manifest, settings)


def _storage(settings: Settings) -> Storage:
    bits, block_size = int(settings.bits), int(settings.block_size)
    return Storage.model_validate({"scheme": settings.scheme, "bits": bits, "block_size": block_size})


def _print_written(manifest: Manifest, settings: Settings) -> None:
    stored = manifest.quantisation
    print(
        f"{settings.out / manifest.name}: {manifest.size_bytes / 1e6:.1f} MB, "
        f"cosine {stored.parity_cosine} and largest difference {stored.parity_max_error} to PyTorch"
    )


def run_evaluation(folder: Path, ask: Ask, settings: Settings) -> list[Score]:
    """Score the model in ``folder``, served by ``ask``, on the sets that the recipe of its name lists."""
    manifest = _manifest(folder)
    recipe = load_recipe(settings.recipe or manifest.name)
    scores: list[Score] = []
    for each in recipe.evaluate:
        found = evaluate(ask, manifest, folder, recipe, each, settings.data, settings.limit)
        scores += found.scores
        print(_line(manifest.name, found))
    if settings.write:
        manifest = manifest.model_copy(update={"scores": tuple(scores)})
        write_card(folder, manifest)
        write_manifest(folder, manifest)
    return scores


def run_quantising(folder: Path, serve: Serve, settings: Settings) -> None:
    """Measure the model in ``folder`` stored in every way there is, and write what was found into its manifest."""
    manifest = _manifest(folder)
    recipe = load_recipe(settings.recipe or manifest.name)

    def score(ask: Ask, stored: Manifest, out: Path) -> list[Evaluation]:
        # How matrices are stored says nothing of how passages are found.
        sets = [each for each in recipe.evaluate if not each.knowledge_base]
        return [evaluate(ask, stored, out, recipe, each, settings.data, settings.limit) for each in sets]

    measured = []
    for variant in variants(folder, recipe, settings.data, serve, score):
        measured.append(variant)
        scores = ", ".join(f"{score.metric} {score.value:.2f}" for score in variant.scores)
        joules = variant.active_j_per_query
        cost = "unavailable J" if joules is None else f"{joules:.3g} J ({variant.quality})"
        print(f"{manifest.name} {variant.scheme}, {variant.bits} bits: {variant.size_mb} MB; {scores}; {cost} a query")
    if settings.write:
        manifest = manifest.model_copy(update={"variants": tuple(measured)})
        write_card(folder, manifest)
        write_manifest(folder, manifest)


def run_confidence(folder: Path, serve: Serve, settings: Settings) -> None:
    """Fit the confidence of the model in ``folder`` and write it into its manifest; ``serve`` serves a model."""
    manifest = _manifest(folder)
    recipe = load_recipe(settings.recipe or manifest.name)
    with TemporaryDirectory() as scratch:
        neutral = Path(scratch) / manifest.name
        shutil.copytree(folder, neutral)
        write_manifest(neutral, manifest.model_copy(update={"confidence": NEUTRAL}))
        with serve(neutral) as ask:
            fitted = fit_confidence(ask, manifest, recipe, settings.data, settings.limit)
    write_manifest(folder, manifest.model_copy(update={"confidence": fitted}))
    print(
        f"{manifest.name}: confidence 1 / (1 + exp(-({fitted.slope:.3f} * score {fitted.intercept:+.3f}))), "
        f"abstains below {fitted.least:.2f}; fitted on {fitted.rows:,} questions of {fitted.data}"
    )


def run_search_speed(folder: Path, ask: Ask, settings: Settings) -> None:
    """Time searches in a large knowledge base, made of the sentences that the recipe of the model's name trains on."""
    recipe = load_recipe(settings.recipe or _manifest(folder).name)
    rows = [row for _, part in load_rows(recipe, settings.data) for row in part]
    if not all(row.keys() >= {"context", "question"} for row in rows):
        raise TrainingError(f"{recipe.name}: its data has no passages and questions; name a recipe for answers")
    found = search_speed(ask, rows, settings.passages)
    print(
        f"{found.passages:,} passages put in {found.put_s:.0f} s; a search takes {found.median_ms:.1f} ms at the "
        f"median, {found.p95_ms:.1f} ms at the 95th percentile"
    )


def _manifest(folder: Path) -> Manifest:
    try:
        return load_manifest(folder)
    except ArtefactError as error:
        raise TrainingError(f"{folder}: {error}") from error


def _line(name: str, found: Evaluation) -> str:
    first = found.scores[0]
    values = ", ".join(f"{score.metric} {score.value:.2f}" for score in found.scores)
    cost = "" if not found.queries or found.joules is None else f"; {found.joules / found.queries:.3g} J a query"
    setting = f" ({first.setting})" if first.setting else ""
    return f"{name} on {first.data} {first.split}{setting}, {first.rows:,} rows: {values}{cost}" + (
        f" ({found.quality})" if cost else ""
    )
