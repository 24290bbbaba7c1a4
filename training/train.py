"""One stage: a recipe and a data folder in, a trained checkpoint in the run's folder out."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from models.manifest import Parent, Stage, StageKind
from models.transformer import Transformer
from training.blocks import prepare
from training.budget import sized
from training.checkpoint import CHECKPOINT, load_checkpoint
from training.data import batches_by_tokens, mixed, read_set, take_share
from training.distil import with_teacher
from training.distributed import Execution, Layout, in_turn
from training.errors import TrainingError, writing
from training.fake_quantise import FakeQuantised
from training.formats import Row
from training.loop import Work, fit_model
from training.parents import RECIPE, ParentModel, begin_with, load_parent
from training.pretrain import n_spans
from training.recipe import DataRecipe, HeldOut, Recipe, load_recipe
from training.records import Progress, gco2e, read_lineage, write_ancestors, write_stage, write_whole
from training.targets import read_targets
from training.tasks import TASKS, Loss, Sample, TaskTraining, check_known, collate
from training.together import JointLoss, Together, joined_batches
from training.tokenizer import PAD_ID, learn_byte_bpe, learn_word_pieces, prune, prune_word_pieces
from training.trunk import find_trunk, load_trunk, trunk_tokenizer

TOKENIZER = "tokenizer.json"
KEPT = "kept_ids.npy"
ROWS = "rows.json"
PARENT = "parent.json"
_AFTERWARDS = ("revision", "description", "licence", "evaluate", "export", "fit.checkpoint_every_s", "fit.log_every_s")
"""Fields of a recipe that say nothing of what is learned."""


@dataclass(frozen=True)
class Trained:
    """What the export needs of a finished run."""

    model: Transformer
    tokenizer: Tokenizer
    progress: Progress
    rows: dict[str, int]
    """Rows seen of each data set, by its title."""
    parent: Parent | None
    """Whose weights it started from."""
    lineage: tuple[Stage, ...]
    """The stages that led to the weights, this run's last."""
    data: tuple[DataRecipe, ...]
    """The data sets, of every task."""


@dataclass(frozen=True)
class _Samples:
    """What a run is trained on."""

    rows: dict[str, int]
    """Of each data set, by its title."""
    per_epoch: int
    batches: Callable[[int], Sequence[Sequence[int]]]
    """Of an epoch, as numbers of samples."""
    samples: Sequence[Sample]
    """By number."""
    mark: str
    """Tells them apart from those of other data."""


def train(recipe: Recipe, data: Path, runs: Path, execution: Execution | None = None) -> Trained:
    """Carry out ``recipe`` on the sets under ``data``, in ``runs/<name>``; a second call resumes or just loads.

    All processes of the layout call it together, and all see the same folders. Raises ``TrainingError`` with what to
    do about it.
    """
    execution = execution or Execution()
    layout = execution.layout
    if recipe.together and (layout.world > 1 or execution.fsdp):
        raise TrainingError(f"{recipe.name}: several tasks learn together in one process only")
    if recipe.distil is not None and "relations" in recipe.distil.kinds and execution.compile:
        raise TrainingError(
            "distil.kinds: relations are read inside of layers, where compile hides them; do without it"
        )
    run = runs / recipe.name
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    fresh = not (run / CHECKPOINT).exists()
    parent = load_parent(recipe.init.source, runs) if recipe.init is not None and fresh else None
    teacher = None if recipe.distil is None else load_parent(recipe.distil.teacher, runs)
    learned, tokenizer, samples = _prepare(recipe, data, run, parent, layout)
    torch.manual_seed(recipe.fit.seed)
    model = _model(recipe, tokenizer, recipe.fit.dropout)
    if fresh:
        _begin(model, recipe, run, parent)
        if layout.is_first:
            _remember(recipe, run, parent, teacher)
    if recipe.distil is not None and teacher is not None:
        learned = with_teacher(learned, model, tokenizer, teacher, recipe.distil, recipe.labels)
    if layout.is_first:
        print(f"{recipe.name}: {model.n_parameters / 1e6:.1f} M parameters, {samples.per_epoch:,} samples an epoch, "
              f"on {layout.name}, {torch.get_num_threads()} threads")  # fmt: skip
        if changed := _changed(recipe, run):
            print(
                f"{recipe.name}: its recipe has changed since the run began ({', '.join(changed)}); what was trained "
                f"before is not undone: delete {run} to begin anew"
            )
        write_whole(run / ROWS, json.dumps(samples.rows))
    work = replace(
        work_on(learned, samples.samples, samples.batches),
        describe=lambda sample: repr(tokenizer.decode(sample.ids[:24])),
        late=partial(FakeQuantised, model, recipe.export),
    )
    same = {TOKENIZER: hashlib.sha256((run / TOKENIZER).read_bytes()).hexdigest(), "data": samples.mark}
    progress = fit_model(model, recipe.fit, work, run, execution, same)
    if layout.is_first:
        write_stage(run, _stage(recipe, run, model, progress, _teacher_joules(recipe, data)))
    return load_trained(recipe, runs)


def _prepare(
    recipe: Recipe, data: Path, run: Path, parent: ParentModel | None, layout: Layout
) -> tuple[Loss, Tokenizer, _Samples]:
    """What is minimised, with which tokenizer, on which samples."""
    make_tokenizer = partial(_tokenizer, recipe, run, parent)
    if recipe.objective is not None:
        with in_turn(layout):
            tokenizer, objective, blocks, rows_seen = prepare(recipe, data, run, make_tokenizer)
        # The corpus knows itself what it was made from.
        return objective, tokenizer, _Samples(rows_seen, blocks.per_epoch, blocks.batches, blocks, mark="")
    recipes = recipes_of(recipe)
    rows = [load_rows(each, data) for each in recipes]
    with in_turn(layout):
        tokenizer = make_tokenizer(_texts(recipes, rows))
    tasks = [TASKS[each.task](each, tokenizer) for each in recipes]
    samples = [_encode(*each, tokenizer, n) for n, each in enumerate(zip(tasks, rows, recipes, strict=True))]
    learned = JointLoss(tasks) if recipe.together else tasks[0]
    seen = {part.title: len(each) for sets in rows for part, each in sets}
    return learned, tokenizer, _joined(recipe, samples, seen)


def _begin(model: Transformer, recipe: Recipe, run: Path, parent: ParentModel | None) -> None:
    """Give ``model`` the weights that the recipe starts from."""
    if recipe.trunk is not None:
        load_trunk(model, find_trunk(recipe.trunk), np.load(run / KEPT))
    if recipe.init is not None and parent is not None:
        begin_with(model, parent, recipe.init, recipe.labels, np.load(run / KEPT))


def _remember(recipe: Recipe, run: Path, parent: ParentModel | None, teacher: ParentModel | None) -> None:
    """Leave in the run's folder what it carries out, and which models it comes from."""
    origin = parent or teacher
    if origin is not None:
        relation: Literal["distilled", "fine-tuned"] = "distilled" if _teachers(recipe) else "fine-tuned"
        said = Parent(name=origin.name, relation=relation, licence=origin.licence, note=origin.note)
        write_whole(run / PARENT, said.model_dump_json())
    if parent is not None:
        write_ancestors(run, parent.lineage)
    write_whole(run / RECIPE, recipe.model_dump_json(indent=1))


def _changed(recipe: Recipe, run: Path) -> list[str]:
    """Fields of the recipe on which training depends, and which are not as they were when ``run`` began."""
    if not (run / RECIPE).exists():
        return []  # it began before runs kept their recipes
    then, now = _of_learning((run / RECIPE).read_text(encoding="utf-8")), _of_learning(recipe.model_dump_json())
    return [name for name in now if then.get(name) != now[name]]


def _of_learning(recipe: str) -> dict[str, Any]:
    """The fields of a recipe in JSON that say what is learned, those of the loop one by one."""
    fields = json.loads(recipe)
    fields |= {f"fit.{name}": value for name, value in fields.pop("fit").items()}
    return {name: value for name, value in fields.items() if name not in _AFTERWARDS}


def _teachers(recipe: Recipe) -> list[str]:
    """Names of all that the recipe has its model learn from."""
    sources = [part.teacher.source for part in recipe.data if part.teacher is not None]
    sources += [] if recipe.distil is None else [recipe.distil.teacher]
    return sorted({Path(source).name for source in sources})


def _teacher_joules(recipe: Recipe, data: Path) -> float | None:
    """What the targets that teachers have written cost; None where there are none, or one of them does not say."""
    parts = [part for part in recipe.data if part.teacher is not None]
    found = [read_targets(data / part.path / f"{part.split}.jsonl.gz") for part in parts]
    joules = [each.joules for each in found if each is not None and each.joules is not None]
    return round(sum(joules), 1) if parts and len(joules) == len(parts) else None


@torch.no_grad()
def _keep(model: Transformer, recipe: Recipe, run: Path, parent: ParentModel, tokenizer: Tokenizer) -> None:
    """Lead ``model`` back towards the weights that it began with, as far as the recipe says."""
    assert recipe.init is not None
    before = _model(recipe, tokenizer)
    _begin(before, recipe, run, parent)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        now.lerp_(then, recipe.init.keep)


def work_on(loss: Loss, samples: Sequence[Sample], epoch_batches: Callable[[int], Sequence[Sequence[int]]]) -> Work:
    """Steps over ``samples``, whose numbers ``epoch_batches`` gives for each step of an epoch."""
    return Work(
        loss=loss,
        epoch_batches=epoch_batches,
        samples=lambda batch: [samples[index] for index in batch],
        collate=lambda members: collate(members, PAD_ID),
    )


def load_trained(recipe: Recipe, runs: Path) -> Trained:
    """The model of a run as its last checkpoint has it. Raises ``TrainingError`` where the run has not ended."""
    run = runs / recipe.name
    if not (run / CHECKPOINT).exists():
        raise TrainingError(f"{run}: no checkpoint; `wattle train {recipe.name}` makes one")
    tokenizer = Tokenizer.from_file(str(run / TOKENIZER))
    model = _model(recipe, tokenizer)
    steps, progress = load_checkpoint(run, model)
    if progress.step < steps:
        raise TrainingError(f"{run}: at step {progress.step} of {steps}; `wattle train {recipe.name}` goes on with it")
    if recipe.init is not None and recipe.init.keep:
        _keep(model, recipe, run, load_parent(recipe.init.source, runs), tokenizer)
    # A run that ended before there were stages has its checkpoint to tell of it.
    lineage = read_lineage(run) or (_stage(recipe, run, model, progress),)
    rows, parent = _rows_seen(recipe, run), _parent(recipe, run)
    return Trained(model.eval(), tokenizer, progress, rows, parent, lineage, _data(recipe))


def _parent(recipe: Recipe, run: Path) -> Parent | None:
    if recipe.trunk is not None:
        trunk = recipe.trunk
        return Parent(name=trunk.name, relation="fine-tuned", licence=trunk.licence, note=trunk.note)
    if recipe.init is not None or recipe.distil is not None:
        return Parent.model_validate_json((run / PARENT).read_text(encoding="utf-8"))
    return None


def _rows_seen(recipe: Recipe, run: Path) -> dict[str, int]:
    """Rows of each data set by title; older runs name them by path alone."""
    rows = json.loads((run / ROWS).read_text(encoding="utf-8"))
    return {part.title: rows[part.title if part.title in rows else part.path] for part in _data(recipe)}


def _data(recipe: Recipe) -> tuple[DataRecipe, ...]:
    """The data sets of a run, of every task, each once."""
    return tuple({part.title: part for each in recipes_of(recipe) for part in each.data}.values())


def _stage(
    recipe: Recipe, run: Path, model: Transformer, progress: Progress, teacher_joules: float | None = None
) -> Stage:
    """What the run was, for those who come after it."""
    parent = _parent(recipe, run)
    from_text = recipe.task == "pretrain" or (recipe.task == "generate" and parent is None)
    kind: StageKind = "pretrain" if from_text else "fine-tune"
    teachers = _teachers(recipe)
    return Stage(
        name=recipe.name,
        kind="distil" if teachers else kind,
        parent=None if parent is None else parent.name,
        teacher=", ".join(teachers) or None,
        data=tuple(part.title for part in _data(recipe)),
        parameters=model.n_parameters,
        steps=progress.step,
        tokens=progress.tokens,
        elapsed_s=round(progress.elapsed_s, 1),
        joules=None if progress.joules is None else round(progress.joules, 1),
        gco2e=gco2e(progress.joules),
        quality=progress.quality,  # type: ignore[arg-type]
        device=progress.device,
        loss=None if math.isnan(progress.loss) else round(progress.loss, 4),
        teacher_joules=teacher_joules,
    )


def recipes_of(recipe: Recipe) -> list[Recipe]:
    """The recipe and those whose tasks its run learns too."""
    return [recipe, *map(load_recipe, recipe.together)]


def members_of(model: Transformer) -> list[Transformer]:
    """The model of each of a run's tasks."""
    return model.members if isinstance(model, Together) else [model]


def trained_tasks(recipe: Recipe, trained: Trained) -> Iterator[tuple[Recipe, Trained]]:
    """Each task of a run as a model of its own, those beside the first under the run's name and theirs."""
    for each, model in zip(recipes_of(recipe), members_of(trained.model), strict=True):
        name = recipe.name if each is recipe else f"{recipe.name}-{each.name}"
        yield each.model_copy(update={"name": name, "trunk": recipe.trunk}), replace(trained, model=model)


def _model(recipe: Recipe, tokenizer: Tokenizer, dropout: float = 0.0) -> Transformer:
    configs = [sized(each, tokenizer.get_vocab_size()) for each in recipes_of(recipe)]
    return Together(configs[0], configs[1:], dropout) if recipe.together else Transformer(configs[0], dropout)


def load_rows(recipe: Recipe, data: Path) -> list[tuple[DataRecipe, list[Row]]]:
    """The training rows of every data set, labels renamed, held-out passages left out, shares and mix applied."""
    fields = TASKS[recipe.served_task].fields
    result = []
    for part in recipe.data:
        source = read_set(data, part, fields, recipe.labels)
        rows = list(tqdm(source, desc=f"reading {part.path}", unit="row", delay=1.0))
        if recipe.held_out is not None and recipe.held_out.path == part.path:
            unseen = held_out_passages(recipe.held_out, rows)
            rows = [row for row in rows if row["context"] not in unseen]
        if part.extractive:
            rows = [{**row, "extractive": True} for row in rows]
        result.append((part, rows))
    parts = mixed([part.share * len(rows) for part, rows in result], recipe.mix.temperature)
    return [
        (part, take_share(rows, count / max(1, len(rows)), recipe.fit.seed))
        for (part, rows), count in zip(result, parts, strict=True)
    ]


def held_out_passages(held_out: HeldOut, rows: list[Row]) -> set[str]:
    """The passages of ``rows`` that training never sees."""
    return set(_held_out(held_out, rows))


def confidence_passages(held_out: HeldOut, rows: list[Row]) -> set[str]:
    """The passages among those that training never sees on which confidence is fitted."""
    unseen = _held_out(held_out, rows)
    return set(unseen[: round(len(unseen) * held_out.confidence_share)])


def _held_out(held_out: HeldOut, rows: list[Row]) -> list[str]:
    passages = list(dict.fromkeys(row["context"] for row in rows))
    return passages[round(len(passages) * (1 - held_out.passages_share)) :]


def _tokenizer(recipe: Recipe, run: Path, parent: ParentModel | None, texts: Iterable[str]) -> Tokenizer:
    """The run's tokenizer, made once and kept: a resumed run must read with the ids it began with."""
    path = run / TOKENIZER
    if not path.exists():
        tokenizer, kept = learn_tokenizer(recipe, texts, parent)
        if kept is not None:
            with writing(run / KEPT):
                np.save(run / KEPT, kept)
        write_whole(path, tokenizer.to_str(pretty=True))
    return Tokenizer.from_file(str(path))


def learn_tokenizer(
    recipe: Recipe, texts: Iterable[str], parent: ParentModel | None = None
) -> tuple[Tokenizer, NDArray[np.int64] | None]:
    """A new tokenizer of ``recipe``, and where it is cut from the trunk's or the parent's, their ids of its words."""
    if recipe.trunk is not None:
        return prune_word_pieces(
            trunk_tokenizer(find_trunk(recipe.trunk)),
            tqdm(texts, desc="counting word pieces", unit="text", mininterval=1.0),
            recipe.tokenizer.vocab_size,
            mask_handles=recipe.tokenizer.mask_handles,
            mask=recipe.objective == "masked",
        )
    if parent is not None:
        return prune(
            parent.tokenizer,
            tqdm(texts, desc="counting tokens", unit="text", mininterval=1.0),
            recipe.tokenizer.vocab_size,
            mask_handles=recipe.tokenizer.mask_handles,
            mask=recipe.objective == "masked",
        )
    if recipe.tokenizer.kind == "word-piece":
        return learn_word_pieces(texts, recipe.tokenizer.vocab_size), None
    architecture = recipe.model.architecture
    chat, ends = architecture == "decoder", architecture == "encoder-decoder"
    spans = n_spans(recipe.max_tokens) if recipe.objective == "denoise" else 0
    size = recipe.tokenizer.vocab_size
    return learn_byte_bpe(texts, size, end_every_text=ends, chat=chat, n_sentinels=spans), None


def _texts(recipes: Sequence[Recipe], rows: Sequence[list[tuple[DataRecipe, list[Row]]]]) -> Iterator[str]:
    for recipe, sets in zip(recipes, rows, strict=True):
        for _, part in sets:
            for row in part:
                yield from TASKS[recipe.task].texts(row)


def _encode(
    task: TaskTraining, rows: list[tuple[DataRecipe, list[Row]]], recipe: Recipe, tokenizer: Tokenizer, number: int
) -> list[Sample]:
    every = [row for _, each in rows for row in each]
    order = np.random.default_rng(recipe.fit.seed).permutation(len(every))
    shuffled: Iterator[Row] = (every[index] for index in order)
    bar = tqdm(shuffled, total=len(every), desc="encoding", unit="row", mininterval=1.0)
    samples = [sample for row in bar for sample in task.samples(row)]
    if not samples:
        raise TrainingError(f"{recipe.name}: no row gives a usable sample; check max_tokens and the data")
    check_known(recipe.name, tokenizer, [sample.ids for sample in samples])
    for sample in samples:
        sample.task = number
    return samples


def _joined(recipe: Recipe, tasks: Sequence[list[Sample]], rows: dict[str, int]) -> _Samples:
    """The samples of all tasks, numbered one task after the other; a batch is of one task."""
    fit = recipe.fit
    every = [sample for samples in tasks for sample in samples]
    lengths = [[sample.length for sample in samples] for samples in tasks]
    longest = max(map(max, lengths))
    if longest > fit.batch_tokens:
        raise TrainingError(f"a sample has {longest} tokens: raise fit.batch_tokens above it or lower max_tokens")

    def batches(epoch: int) -> list[list[int]]:
        each = [batches_by_tokens(task, fit.batch_tokens, fit.seed, epoch) for task in lengths]
        if len(each) == 1:
            return each[0]
        firsts = [sum(map(len, lengths[:number])) for number in range(len(lengths))]
        return joined_batches(each, firsts, recipe.mix.temperature, fit.seed, epoch)

    numbers = chain.from_iterable((len(s.ids), *s.ids, *(s.target or ()), *(s.labels or ())) for s in every)
    mark = hashlib.sha256(np.fromiter(numbers, dtype=np.int32).tobytes()).hexdigest()
    return _Samples(rows, len(every), batches, every, mark)
