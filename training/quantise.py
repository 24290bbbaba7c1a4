"""One stage: exported models in, what each is like with its matrices stored in other ways out. Knows nothing of
training or HTTP: what was quantised before is quantised once more, from what its codes stand for."""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer
from tqdm import tqdm

from energy.host import Moment, processor
from models.graph import write_graphs
from models.manifest import Load, Manifest, Quantisation, Score, Variant, load_manifest, write_manifest
from models.weights import read_weights
from training.card import write_card
from training.errors import TrainingError
from training.evaluate import BASELINE, REQUEST_TEXTS, Evaluation, Query, asked, cost, evaluate
from training.export import (
    Finished,
    one_by_one,
    parity_batch,
    random_batch,
    real_samples,
    write_model,
    write_quantised,
)
from training.graphs import Graphs
from training.knowledge import Ask
from training.recipe import EvaluateRecipe, Recipe, Storage

Serve = Callable[[Path], AbstractContextManager[Ask]]
"""Serves the model in a folder for a while."""

WAYS = (
    Storage(scheme="none"),
    Storage(scheme="rowwise"),
    Storage(scheme="calibrated"),
    Storage(scheme="calibrated", bits=7),
    Storage(scheme="blockwise", bits=8, block_size=64),
    Storage(scheme="blockwise", bits=4, block_size=32),
)
ROUNDS = 9


@dataclass(frozen=True)
class Subject:
    """An exported model to measure, and what it is asked about, of the sets of its recipe."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    sets: tuple[EvaluateRecipe, ...]


def subjects_of(folder: Path, manifest: Manifest, recipe: Recipe) -> list[Subject]:
    """The model once, or where its recipe asks the same data in several settings, once in each.

    Knowledge bases are left out: how matrices are stored says nothing of how passages are found. Raises
    ``TrainingError`` where a setting is asked of some sets only, for its figures would stand for no other.
    """
    asked_before: dict[str, list[EvaluateRecipe]] = defaultdict(list)
    times: dict[int, list[EvaluateRecipe]] = defaultdict(list)
    for each in recipe.evaluate:
        if not each.knowledge_base:
            times[len(asked_before[each.path])].append(each)
            asked_before[each.path].append(each)
    if len({tuple(each.path for each in sets) for sets in times.values()}) > 1:
        raise TrainingError(
            f"{recipe.name}: [[evaluate]] has sets in more settings than others; give all of them as many"
        )
    return [Subject(folder, manifest, recipe, tuple(sets)) for sets in times.values()]


@dataclass(frozen=True)
class Candidate:
    """A model stored in one way, being served."""

    subject: Subject
    folder: Path
    manifest: Manifest
    ask: Ask


def variants(
    subjects: Sequence[Subject], data: Path, serve: Serve, limit: int | None
) -> Iterator[tuple[Subject, Variant]]:
    """Store each model's matrices in each of ``WAYS`` and serve them all; have them scored, then measured in turns.

    All ways start from the same weights, those that a model's own codes stand for. ``limit`` is of the rows of a set
    that are scored. The subjects must have the same task and sets, in whatever settings: only what answered the same
    queries compares.
    Raises ``ArtefactError`` for a folder that is no model.
    """
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as serving:
        candidates = []
        for number, (subject, how) in enumerate(product(subjects, WAYS)):
            out = Path(scratch) / str(number)
            how = how.model_copy(update={"table_bits": subject.manifest.quantisation.table_bits})
            manifest = quantise(subject.folder, subject.recipe, data, how, out)
            candidates.append(Candidate(subject, out, manifest, serving.enter_context(serve(out))))
        scores = [_scores(candidate, data, limit) for candidate in candidates]
        queries = [asked(subjects[0].recipe, each, data) for each in subjects[0].sets]
        costs, load = cost_in_turns(candidates, queries)
        for candidate, found, (joules, quality) in zip(candidates, scores, costs, strict=True):
            stored = candidate.manifest.quantisation
            yield (
                candidate.subject,
                Variant(
                    scheme=stored.scheme,
                    bits=stored.bits,
                    size_mb=round(candidate.manifest.size_bytes / 1e6, 1),
                    parity_cosine=stored.parity_cosine or 1.0,
                    scores=found,
                    active_j_per_query=joules,
                    quality=quality,
                    load=load,
                ),
            )


def _scores(candidate: Candidate, data: Path, limit: int | None) -> tuple[Score, ...]:
    subject = candidate.subject
    found = [
        evaluate(candidate.ask, candidate.manifest, candidate.folder, subject.recipe, each, data, limit)
        for each in subject.sets
    ]
    return tuple(score for each in found for score in each.scores if not score.metric.endswith(BASELINE))


def cost_in_turns(
    candidates: Sequence[Candidate], sets: Sequence[Sequence[Query]]
) -> tuple[list[tuple[float | None, str]], Load]:
    """Active joules a query of each candidate with the meter's quality, and at which load.

    In a round each candidate in its turn answers one request of the same queries of each set, in its own settings; the
    next round has the next queries, so that no answer or prompt is remembered while there are new ones. The first
    round warms up. Of the others the median counts: a neighbour who comes and goes disturbs all candidates of a round
    alike.
    """
    rounds: list[list[Evaluation]] = [[] for _ in candidates]
    began = Moment.now()
    turns = range(ROUNDS + 1 if any(sets) else 0)
    for number in tqdm(turns, desc="measuring in turns", unit="round", mininterval=1.0):
        if number == 1:
            began = Moment.now()
        texts = slice(number * REQUEST_TEXTS, (number + 1) * REQUEST_TEXTS)
        for candidate, found in zip(candidates, rounds, strict=True):
            task, name = candidate.subject.recipe.task, candidate.manifest.name
            parts = [
                cost(candidate.ask, task, name, each.setting, list(islice(cycle(queries), texts.start, texts.stop)))
                for each, queries in zip(candidate.subject.sets, sets, strict=True)
                if queries
            ]
            if number:
                found += [_together(parts)]
    load = Load(
        texts_per_request=REQUEST_TEXTS,
        queries=sum(each.queries for each in rounds[0]),
        rounds=len(rounds[0]),
        cores=len(os.sched_getaffinity(0)),
        processor=processor(),
        foreign_cores=Moment.now().foreign_cores(began),
    )
    return [_median(found) for found in rounds], load


def _together(parts: Sequence[Evaluation]) -> Evaluation:
    joules = [each.joules for each in parts]
    known = [each for each in joules if each is not None]
    total = sum(known) if len(known) == len(joules) else None
    return Evaluation([], sum(each.queries for each in parts), total, parts[0].quality)


def _median(rounds: Sequence[Evaluation]) -> tuple[float | None, str]:
    """Unknown as soon as one round is."""
    joules = [each.joules / each.queries for each in rounds if each.joules is not None]
    if not rounds or len(joules) < len(rounds):
        return None, "unavailable"
    return round(median(joules), 5), rounds[-1].quality


def quantise(folder: Path, recipe: Recipe, data: Path, how: Storage, out: Path) -> Manifest:
    """Write the model in ``folder`` into ``out``, stored as ``how`` says.

    Its manifest says how far it is from the same weights in float32, on samples of the recipe's data; scores are left
    out, as nobody has measured them.
    """
    manifest = load_manifest(folder)
    weights = read_weights(folder, manifest.quantisation)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    samples = real_samples(recipe, tokenizer, data)
    batch = parity_batch(samples)
    with tempfile.TemporaryDirectory() as scratch:
        write_graphs(Path(scratch), manifest.config, weights, "none")
        reference = Graphs(Path(scratch), manifest.config).logits(batch)
    out.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.json", out)
    texts = one_by_one(samples)
    model = Finished(manifest.name, manifest.config, weights, tokenizer, batch, None, texts)
    stored = write_quantised(out, model, how, reference)
    changed = manifest.model_copy(update={"quantisation": stored, "scores": ()})
    write_card(out, changed)
    return write_manifest(out, changed)


def store_anew(folder: Path, out: Path, name: str | None, how: Storage) -> Manifest:
    """Write ``out/<name>``, by default of the same name: the model in ``folder``, stored as ``how`` says, without the
    scores, which nobody has measured.

    Raises ``ArtefactError`` for a folder that is no model, and ``TrainingError`` for what needs the model's data.
    """
    if how.scheme == "calibrated":
        raise TrainingError(
            f"{folder}: the calibrated scheme needs data of the kind that the model reads: `wattle export` does it, "
            "by the model's recipe"
        )
    before = load_manifest(folder)
    if how.scheme in ("rowwise", "blockwise"):
        how = how.model_copy(update={"table_bits": before.quantisation.table_bits})
    weights, batch = read_weights(folder, before.quantisation), random_batch(before.config, before.special_ids.pad)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Finished(name or before.name, before.config, weights, tokenizer, batch, None)

    def describe(stored: Quantisation) -> Manifest:
        changes = {"name": model.name, "quantisation": stored, "scores": (), "variants": ()}
        return before.model_copy(update=changes)

    return write_model(model, how, describe, out)
