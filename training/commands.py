"""What ``wattle train``, ``distil-data``, ``export``, ``evaluate`` and the like do, stage after stage."""

import json
import re
import shutil
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import ValidationError

from models.manifest import NAME_PATTERN, Manifest, Score, Variant, write_manifest
from training.blocks import held_out_loss
from training.card import write_card
from training.distributed import Execution, join
from training.endpoint import endpoint_teacher
from training.errors import TrainingError, complaints
from training.evaluate import Evaluation, evaluate, fit_confidence
from training.export import export
from training.few_shot import load_study, run_study, table
from training.frontier import frontiers, verdict, write_frontiers
from training.knowledge import NEUTRAL, Ask
from training.parents import find_folder, read_model_manifest, run_recipe
from training.plan import PROPORTIONS, Budget, as_text, make_plan, write_recipe
from training.quantise import Serve, Subject, subjects_of, variants
from training.recipe import BudgetRecipe, DataRecipe, Recipe, Storage, load_recipe
from training.report import read_models, read_run, write_report
from training.search_speed import search_speed
from training.settings import Settings
from training.targets import Teacher, served_teacher, write_targets
from training.train import load_rows, load_trained, train, trained_tasks


def _recipe(name: str, settings: Settings) -> Recipe:
    """The recipe, with the budget of the command line over its own."""
    recipe = load_recipe(name)
    if settings.max_parameters is None and settings.max_mb is None:
        return recipe
    budget = BudgetRecipe(max_parameters=settings.max_parameters, max_mb=settings.max_mb)
    try:
        return Recipe.model_validate({**recipe.model_dump(), "budget": budget.model_dump()})
    except ValidationError as error:
        raise TrainingError(f"{recipe.name}: {complaints(error)}") from error


def run_training(name: str, settings: Settings) -> None:
    """Train and export; a run that was interrupted goes on, one that has ended is only exported.

    A pretraining run is not exported; what it makes of text that it has not seen is printed.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    recipe = _recipe(name, settings)
    with join(settings.device) as layout:
        execution = Execution(layout, settings.micro_batch_tokens, settings.recompute, settings.compile, settings.fsdp)
        trained = train(recipe, settings.data, settings.runs, execution)
    if not layout.is_first:
        return
    if recipe.objective is None:
        run_export(name, settings)
        return
    for each in recipe.evaluate:
        found = held_out_loss(trained.model, trained.tokenizer, recipe, each, settings.data)
        print(f"{recipe.name} on {each.path} {each.split}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    print(
        f"{settings.runs / recipe.name}: pretrained, no model to serve yet; a fine-tuning recipe starts from it with "
        f'[init] from = "{recipe.name}"'
    )


def run_few_shot(name: str, settings: Settings) -> None:
    """Compare ways to adapt to a few examples, as the study called ``name`` says."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    print(table(run_study(load_study(name), settings.data)))


def run_export(name: str, settings: Settings) -> None:
    """Export a finished run."""
    recipe = _recipe(name, settings)
    for each, trained in trained_tasks(recipe, load_trained(recipe, settings.runs)):
        _print_written(export(each, trained, settings.data, settings.out), settings)


def run_distil_data(name: str, serve: Serve, settings: Settings) -> None:
    """Have the teachers of a recipe write the targets of its data sets; ``serve`` serves an exported model."""
    recipe = _recipe(name, settings)
    written = [part for part in recipe.data if part.teacher is not None]
    if not written:
        raise TrainingError(f"{recipe.name}: no [[data]] has a teacher")
    for part in written:
        with _teacher(recipe, part, serve, settings) as teacher:
            found = write_targets(teacher, recipe, part, settings.data, settings.limit)
        cost = "unavailable J" if found.joules is None else f"{found.joules:,.0f} J ({found.quality})"
        print(
            f"{settings.data / part.path}: {found.rows:,} rows by {found.teacher}, {found.left_out:,} inputs left "
            f"out, {found.elapsed_s / 60:.0f} minutes, {cost}"
        )


@contextmanager
def _teacher(recipe: Recipe, part: DataRecipe, serve: Serve, settings: Settings) -> Iterator[Teacher]:
    wanted = part.teacher
    assert wanted is not None
    if wanted.url is not None:
        with endpoint_teacher(wanted, settings.teacher_key) as teacher:
            yield teacher
        return
    with TemporaryDirectory() as scratch:
        folder = find_folder(wanted.source)
        if folder is None:
            run = run_recipe(wanted.source, settings.runs)
            export(run, load_trained(run, settings.runs), settings.data, Path(scratch))
            folder = Path(scratch) / run.name
        manifest = read_model_manifest(folder)
        with serve(folder) as ask:
            yield served_teacher(ask, recipe.task, manifest.name, manifest.revision, wanted)


def run_import(source: str, settings: Settings) -> None:
    """Import a model of the transformers library, or store one that was exported before in another way."""
    from training.importing import import_model  # transformers takes seconds, and no other command needs it

    manifest = import_model(
        source,
        settings.out,
        name=settings.name,
        how=_storage(settings),
        max_positions=settings.max_positions,
        source_language=settings.source_language,
        target_language=settings.target_language,
        texts=settings.texts,
    )
    _print_written(manifest, settings)


def _storage(settings: Settings) -> Storage:
    bits, block_size = int(settings.bits), int(settings.block_size)
    return Storage.model_validate({"scheme": settings.scheme, "bits": bits, "block_size": block_size})


def _print_written(manifest: Manifest, settings: Settings) -> None:
    stored = manifest.quantisation
    print(
        f"{settings.out / manifest.name}: {manifest.size_bytes / 1e6:.1f} MB, "
        f"cosine {stored.parity_cosine} and largest difference {stored.parity_max_error} to float32"
    )


def run_evaluation(folder: Path, ask: Ask, settings: Settings) -> list[Score]:
    """Score the model in ``folder``, served by ``ask``, on the sets that the recipe of its name lists."""
    manifest = read_model_manifest(folder)
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


def run_quantising(folders: Sequence[Path], serve: Serve, settings: Settings) -> None:
    """Measure the models in ``folders`` stored in every way there is, and write what was found into their manifests.

    Models of one task that are asked about the same sets are measured in turns, for they will be compared.
    """
    together: dict[Hashable, list[Subject]] = {}
    for folder in folders:
        manifest = read_model_manifest(folder)
        for subject in subjects_of(folder, manifest, load_recipe(settings.recipe or manifest.name)):
            key = subject.recipe.task, json.dumps([each.model_dump(exclude={"setting"}) for each in subject.sets])
            together.setdefault(key, []).append(subject)
    for subjects in together.values():
        measured: dict[Path, list[Variant]] = {subject.folder: [] for subject in subjects}
        for subject, variant in variants(subjects, settings.data, serve, settings.limit):
            measured[subject.folder].append(variant)
            print(_variant_line(subject.manifest.name, variant))
        of_folder = {subject.folder: subject.manifest for subject in subjects}
        for folder, manifest in of_folder.items() if settings.write else ():
            manifest = manifest.model_copy(update={"variants": tuple(measured[folder])})
            write_card(folder, manifest)
            write_manifest(folder, manifest)


def _variant_line(name: str, variant: Variant) -> str:
    scores = ", ".join(f"{score.metric} {score.value:.2f}" for score in variant.scores)
    joules = variant.active_j_per_query
    cost = "unavailable J" if joules is None else f"{joules:.3g} J ({variant.quality})"
    said = f", {variant.setting}" if variant.setting else ""
    return f"{name} {variant.scheme}, {variant.bits} bits{said}: {variant.size_mb} MB; {scores}; {cost} a query"


def run_frontier(folders: Sequence[Path], page: Path) -> None:
    """Write quality against joules per query of the models in ``folders``, which `wattle quantise` has measured."""
    found = frontiers([read_model_manifest(folder) for folder in folders])
    for each in found:
        print(verdict(each))
    print(", ".join(map(str, write_frontiers(found, page))))


def run_plan(path: Path | None, settings: Settings) -> None:
    """Propose a model and a run within the budgets, and write its recipe to ``path`` where there is one."""
    if settings.task is None:
        raise TrainingError(f"--task is missing: one of {', '.join(PROPORTIONS)}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = path.stem if path is not None else f"{settings.task}-planned"
    if re.match(NAME_PATTERN, name) is None:
        raise TrainingError(f"{path}: a model cannot be called {name!r}: small letters, digits, dots and dashes")
    budget = Budget(settings.max_mb, settings.max_joules, settings.hours)
    base = load_recipe(PROPORTIONS[settings.task])
    plan = make_plan(base, budget, settings.data, settings.runs, settings.out, name)
    print(as_text(plan, budget))
    if path is not None:
        write_recipe(plan.recipe, path)
        print(f"wattle train {path} --data {settings.data} carries it out")


def run_report(names: Sequence[str], page: Path, settings: Settings) -> None:
    """Write a page on the runs of these names."""
    runs = [read_run(settings.runs, name) for name in dict.fromkeys(names)]
    write_report(runs, read_models([run.lineage for run in runs], settings.out), page)
    print(page)


def run_confidence(folder: Path, serve: Serve, settings: Settings) -> None:
    """Fit the confidence of the model in ``folder`` and write it into its manifest; ``serve`` serves a model."""
    manifest = read_model_manifest(folder)
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
    recipe = load_recipe(settings.recipe or read_model_manifest(folder).name)
    rows = [row for _, part in load_rows(recipe, settings.data) for row in part]
    if not all(row.keys() >= {"context", "question"} for row in rows):
        raise TrainingError(f"{recipe.name}: its data has no passages and questions; name a recipe for answers")
    found = search_speed(ask, rows, settings.passages)
    print(
        f"{found.passages:,} passages put in {found.put_s:.0f} s; a search takes {found.median_ms:.1f} ms at the "
        f"median, {found.p95_ms:.1f} ms at the 95th percentile"
    )


def _line(name: str, found: Evaluation) -> str:
    first = found.scores[0]
    values = ", ".join(f"{score.metric} {score.value:.2f}" for score in found.scores)
    cost = "" if not found.queries or found.joules is None else f"; {found.joules / found.queries:.3g} J a query"
    setting = f" ({first.setting})" if first.setting else ""
    return f"{name} on {first.data} {first.split}{setting}, {first.rows:,} rows: {values}{cost}" + (
        f" ({found.quality})" if cost else ""
    )
