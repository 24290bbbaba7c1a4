"""What runs cost and what came of it, as one HTML page with plots. Reads records and manifests; knows nothing of how
a run is carried out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from energy.charts import COLOURS, Series, plot
from energy.requests import weakest
from energy.sheet import Line, Table, render
from energy.types import Quality
from models.manifest import ArtefactError, Manifest, Stage, Variant, read_manifest
from training.errors import TrainingError, writing
from training.records import LOG, read_lineage, read_log

LIMITS = (
    "Joules of training are the whole machine's while the run held it, idle included; joules per query are active "
    "ones, above idle. Grams of CO2e are at the world's average grid. Losses compare only between runs on the same "
    "data with the same vocabulary. Estimated joules are reckoned from CPU time: they rank one machine's runs and are "
    "no reading of a meter. A dash is unknown, not zero."
)
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Run:
    """What is known of one run."""

    name: str
    log: Sequence[Mapping[str, Any]]
    """Its lines, as ``training.records`` writes them; at least one."""
    lineage: tuple[Stage, ...]
    """The stages that led to its weights, its own last; empty where it has not ended."""


@dataclass(frozen=True)
class BreakEven:
    """When a student has repaid what its training and its teacher's targets cost. ``None`` is unknown."""

    student: str
    teacher: str
    spent_j: float | None
    student_j: float | None
    """Active, per query."""
    teacher_j: float | None
    quality: str
    """Of the weakest of the figures."""
    together: bool
    """Whether the two were measured in the same rounds."""
    counts_targets: bool
    """Whether what the teacher's written targets cost is known, and in ``spent_j``."""

    @property
    def queries(self) -> float | None:
        """The first number of queries after which the student has cost no more; infinite where it is no cheaper."""
        if self.spent_j is None or self.student_j is None or self.teacher_j is None:
            return None
        saved_j = self.teacher_j - self.student_j
        return math.ceil(self.spent_j / saved_j) if saved_j > 0 else math.inf


def read_run(runs: Path, name: str) -> Run:
    """Read ``runs/name``. Raises ``TrainingError`` where there is no such run, or none that kept records."""
    if not (runs / name).is_dir():
        known = sorted(path.name for path in runs.iterdir() if path.is_dir()) if runs.is_dir() else []
        raise TrainingError(f"{runs / name}: no such run; there are {', '.join(known) or 'none'} in {runs}")
    log = read_log(runs / name)
    if not log:
        raise TrainingError(
            f"{runs / name}: no {LOG}, so there is nothing to report; `wattle train {name}` writes it while it runs"
        )
    return Run(name, log, read_lineage(runs / name))


def read_models(lineages: Sequence[tuple[Stage, ...]], out: Path) -> dict[str, Manifest]:
    """The exported models in ``out`` of every name that the lineages mention."""
    names = {name for lineage in lineages for stage in lineage for name in (stage.name, stage.teacher) if name}
    found = {}
    for name in names:
        try:
            found[name] = read_manifest(out / name)
        except ArtefactError:
            continue  # not exported: what it costs to ask is unknown, which the page says
    return found


def break_even(lineage: Sequence[Stage], models: Mapping[str, Manifest]) -> BreakEven | None:
    """For the last stage's model against its newest teacher; None where no stage has one.

    What made the teacher was spent before: stages that its own lineage shares are no cost of the student's.
    """
    taught = [stage for stage in lineage if stage.teacher is not None]
    if not taught or taught[-1].teacher is None:
        return None
    student, teacher = lineage[-1].name, taught[-1].teacher
    shared = {stage.name for stage in models[teacher].lineage} | {teacher} if teacher in models else {teacher}
    own = [stage for stage in lineage if stage.name not in shared]
    spent = [stage.joules for stage in own]
    known = [joules for joules in spent if joules is not None]
    targets = [stage.teacher_joules for stage in own if stage.teacher is not None]
    asked = [_as_served(models.get(name)) for name in (student, teacher)]
    per_query = [variant.active_j_per_query if variant else None for variant in asked]
    qualities = [stage.quality for stage in own] + [variant.quality if variant else "unavailable" for variant in asked]
    return BreakEven(
        student=student,
        teacher=teacher,
        spent_j=sum(known) + sum(each or 0.0 for each in targets) if len(known) == len(spent) else None,
        student_j=per_query[0],
        teacher_j=per_query[1],
        quality=weakest(map(Quality, qualities)).value,
        together=len({variant.load if variant else None for variant in asked}) == 1,
        counts_targets=None not in targets,
    )


def _as_served(manifest: Manifest | None) -> Variant | None:
    """How `wattle quantise` found the model, stored as it is served."""
    if manifest is None:
        return None
    return manifest.stored_as(manifest.quantisation.scheme, manifest.quantisation.bits)


def as_html(runs: Sequence[Run], models: Mapping[str, Manifest]) -> str:
    """The page."""
    ended = [run for run in runs if run.lineage]
    found = [each for run in ended if (each := break_even(run.lineage, models)) is not None]
    tables = [_lineage(runs)]
    if found:
        tables.append(_break_even(found))
    names = ", ".join(run.name for run in runs)
    return render(f"Training of {names}", _subtitle(runs), _notes(runs), tables, _plots(runs), LIMITS)


def _subtitle(runs: Sequence[Run]) -> str:
    lines = [run.log[-1] for run in runs]
    joules = _sum([line["joules"] for line in lines])
    tokens, hours = sum(line["tokens"] for line in lines), sum(line["elapsed_s"] for line in lines) / 3600
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    spent = "unknown joules" if joules is None else f"{scaled(joules)}J"
    return f"{spent}, {scaled(tokens)} tokens, {hours:.2f} hours in {count}, as far as they are."


def _notes(runs: Sequence[Run]) -> list[str]:
    notes = [
        f"{run.name}: joules are unavailable, for the machine that trained it has no meter and no estimate."
        for run in runs
        if run.log[-1]["joules"] is None
    ]
    qualities = {stage.quality for run in runs for stage in run.lineage if stage.joules is not None}
    if len(qualities) > 1:
        notes.append(f"Joules of these stages do not compare: some are {' and some '.join(sorted(qualities))}.")
    return notes


def _lineage(runs: Sequence[Run]) -> Table:
    """Every stage once, the oldest of a run first."""
    stages = dict.fromkeys(stage for run in runs for stage in run.lineage)
    rows = [_stage_cells(stage) for stage in stages]
    for run in runs:
        if not run.lineage:
            rows.append([run.name, "has not ended", *_so_far(run.log[-1]), *["-"] * 7])
    head = ["stage", "kind", "joules", "seconds", "steps", "tokens", "loss", "gCO2e", "meter", "targets J"]
    return Table("Lineage", [*head, "parameters", "starts from", "teacher", "data"], rows, _totals(list(stages)))


def _so_far(line: Mapping[str, Any]) -> list[str]:
    counts = [f"{line[name]:,.0f}" for name in ("elapsed_s", "step", "tokens")]
    return [figure(line["joules"]), *counts, figure(line["loss"])]


def _stage_cells(stage: Stage) -> list[str]:
    return [
        stage.name,
        stage.kind,
        figure(stage.joules),
        f"{stage.elapsed_s:,.0f}",
        f"{stage.steps:,}",
        f"{stage.tokens:,}",
        figure(stage.loss),
        figure(stage.gco2e),
        stage.quality,
        figure(stage.teacher_joules),
        f"{stage.parameters:,}",
        stage.parent or "nothing",
        stage.teacher or "-",
        ", ".join(stage.data),
    ]


def _totals(stages: Sequence[Stage]) -> list[Line]:
    if len(stages) < 2:
        return []
    joules, grams = _sum([stage.joules for stage in stages]), _sum([stage.gco2e for stage in stages])
    return [Line(f"All stages: {figure(joules)} J, {figure(grams)} gCO2e, without what teachers' targets cost.")]


def _break_even(found: Sequence[BreakEven]) -> Table:
    rows = [
        [each.student, each.teacher, *map(figure, (each.spent_j, each.teacher_j, each.student_j)), _said(each)]
        for each in found
    ]
    below = [
        Line(
            "Queries after which the student has repaid its making: (joules of its own stages + joules of the "
            "teacher's targets) / (teacher's joules a query - the student's). Joules a query are those of "
            "`wattle quantise --write`, each model stored as it is served."
        )
    ]
    for each in found:
        if each.queries is None:
            below.append(Line(f"{each.student}: {_missing(each)}.", bad=True))
        elif not each.together:
            apart = "were not measured in the same rounds: take the figure as rough"
            below.append(Line(f"{each.student} and {each.teacher} {apart}.", bad=True))
        if not each.counts_targets:
            below.append(
                Line(
                    f"{each.student}: what its teacher wrote beforehand, if anything, has no known cost and is left "
                    "out; what the teacher computed while the student trained is in the joules of that stage."
                )
            )
    head = ["student", "teacher", "spent J", "teacher J/query", "student J/query", "repaid after queries"]
    return Table("Break-even", head, rows, below)


def _said(each: BreakEven) -> str:
    if each.queries is None:
        return "unavailable"
    return "never" if each.queries == math.inf else f"{each.queries:,} ({each.quality})"


def _missing(each: BreakEven) -> str:
    if each.spent_j is None:
        return "what its training cost is unknown"
    names = [name for name, value in ((each.student, each.student_j), (each.teacher, each.teacher_j)) if value is None]
    return f"joules a query of {' and '.join(names)} are unknown; `wattle quantise MODEL ... --write` measures them"


def _plots(runs: Sequence[Run]) -> list[tuple[str, str]]:
    drawn = (
        ("Loss over joules", "joules", "loss", "J"),
        ("Loss over tokens", "tokens", "loss", "tokens"),
        ("Loss over steps", "step", "loss", "steps"),
        ("Tokens a second", "elapsed_s", "tokens_per_s", "s"),
        ("Joules a token", "elapsed_s", "joules_per_token", "s"),
    )
    titles = {"loss": "loss", "tokens_per_s": "tokens/s", "joules_per_token": "J/token"}
    plots = []
    for title, x, y, unit in drawn:
        size, prefix = _prefix(max(line[x] or 0 for run in runs for line in run.log))
        if unit == "s":
            size, prefix, unit = 60.0, "", "minutes"
        series = [
            Series(run.name, _points(run, x, y, size), COLOURS[number % len(COLOURS)], line=True)
            for number, run in enumerate(runs)
        ]
        named = f"{prefix}{unit}" if unit == "J" else f"{prefix} {unit}".strip()
        plots.append((title, plot(series, named, titles[y], y_from_zero=y != "loss")))
    return plots


def _points(run: Run, x: str, y: str, size: float) -> list[tuple[float, float]]:
    return [(line[x] / size, line[y]) for line in run.log if line[x] is not None and _is_number(line[y])]


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _prefix(most: float) -> tuple[float, str]:
    """A unit in which ``most`` has few digits."""
    return next(((size, prefix) for size, prefix in PREFIXES if most >= 10 * size), (1.0, ""))


def scaled(value: float) -> str:
    """A figure with three digits and the prefix of its unit."""
    size, prefix = next(((size, prefix) for size, prefix in PREFIXES if value >= size), (1.0, ""))
    return f"{value / size:.3g} {prefix}"


def figure(value: float | None) -> str:
    """What is unknown is a dash."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _sum(values: Sequence[float | None]) -> float | None:
    """Unknown as soon as one of them is."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def write_report(runs: Sequence[Run], models: Mapping[str, Manifest], page: Path) -> None:
    """Write the page. Raises ``TrainingError`` where it cannot be written."""
    with writing(page):
        page.write_text(as_html(runs, models), encoding="utf-8")
