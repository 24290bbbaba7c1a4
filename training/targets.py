"""One stage: a teacher and the inputs of data sets in, a data set with the teacher's outputs as its targets out.

Sequence-level distillation (Kim and Rush 2016). Knows nothing of how a teacher runs: it is asked for some outputs at a
time, and what it has written is kept however the stage ends.
"""

import gzip
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TextIO

from tqdm import tqdm

from energy.types import Quality
from training.data import clean, read_set
from training.errors import TrainingError
from training.formats import Row
from training.knowledge import Ask
from training.recipe import DataRecipe, Recipe, SetRecipe, TeacherRecipe

FIELDS = {
    "translate": ("source", "target"),
    "summarize": ("document", "summary"),
    "sentiment": ("text", "label"),
    "generate": ("prompt", "response"),
}
"""What a row of each task reads and writes. The answers to questions are places in a text, which nobody writes."""


@dataclass(frozen=True)
class Written:
    """What a teacher said to some inputs, and what that cost."""

    outputs: list[str | None]
    """None where it did not come to an end."""
    joules: float | None
    quality: str


@dataclass(frozen=True)
class Teacher:
    """Whoever writes targets."""

    name: str
    revision: str
    write: Callable[[Sequence[str]], Written]
    texts: int = 32
    """How many inputs it is asked for at once."""


@dataclass
class Targets:
    """What a set of a teacher's targets is, as the file beside it says."""

    teacher: str
    revision: str
    inputs: list[str]
    """The data sets whose inputs they answer."""
    setting: dict[str, Any]
    rows: int = 0
    left_out: int = 0
    """Inputs to which the teacher said nothing, or came to no end."""
    joules: float | None = 0.0
    """Of all outputs, idle power left out; None where one of them has no figure."""
    quality: str = Quality.MEASURED.value
    elapsed_s: float = 0.0
    outputs: dict[str, str | None] = field(default_factory=dict, repr=False)

    @property
    def heading(self) -> dict[str, Any]:
        """What must be the same for a set to be gone on with."""
        return {name: getattr(self, name) for name in ("teacher", "revision", "inputs", "setting")}

    def add(self, part: dict[str, Any]) -> None:
        """Count in what was written at one time."""
        self.outputs.update(part["outputs"])
        self.joules = None if None in (self.joules, part["joules"]) else self.joules + part["joules"]
        self.quality = max(self.quality, part["quality"], key=[each.value for each in Quality].index)
        self.elapsed_s += part["elapsed_s"]


def served_teacher(ask: Ask, task: str, name: str, revision: str, wanted: TeacherRecipe) -> Teacher:
    """The model ``name`` that ``ask`` serves."""

    def write(texts: Sequence[str]) -> Written:
        answer = ask(task, {"model": name, "truncate": True, **wanted.setting, "input": list(texts)})
        energy = answer["energy"]
        return Written([_said(each) for each in answer["results"]], energy["active_j"], energy["quality"])

    return Teacher(name, revision, write)


def _said(result: dict[str, Any]) -> str | None:
    # What was cut off would teach the student to stop anywhere.
    return None if result.get("finish_reason") == "length" else result.get("text", result.get("label"))


def write_targets(teacher: Teacher, recipe: Recipe, part: DataRecipe, data: Path, limit: int | None = None) -> Targets:
    """Write ``<data>/<part.path>/<part.split>.jsonl.gz`` and a ``.json`` beside it that says what it is.

    Every input is asked for once, in random order, so that the first ``limit`` are a fair sample. What was begun goes
    on; what is there already is left as it is. Raises ``TrainingError`` where it was begun with another teacher or
    setting.
    """
    if recipe.task not in FIELDS or part.teacher is None:
        raise TrainingError(f"{recipe.name}: a teacher writes targets for {', '.join(FIELDS)}")
    folder = data / part.path
    whole, partial = folder / f"{part.split}.jsonl.gz", folder / f"{part.split}.partial"
    found = Targets(teacher.name, teacher.revision, list(part.teacher.inputs), part.teacher.asked)
    if whole.exists():
        return _finished(whole, found)
    column = FIELDS[recipe.task][0]
    sets = (SetRecipe(path=path, split=part.teacher.split) for path in part.teacher.inputs)
    inputs = list(dict.fromkeys(clean(row[column]) for each in sets for row in read_set(data, each, ((column,),))))
    Random(recipe.fit.seed).shuffle(inputs)
    inputs = inputs[:limit]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _go_on(partial, found)
        left = [text for text in inputs if text not in found.outputs]
        with (
            partial.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(inputs), initial=len(inputs) - len(left), desc=part.path, unit="text", mininterval=1.0
            ) as bar,
        ):
            if not file.tell():
                _append(file, found.heading)
            for written in _written(teacher, left, part.teacher.parallel):
                _append(file, written)
                found.add(written)
                bar.update(len(written["outputs"]))
        _finish(whole, found, inputs, FIELDS[recipe.task])
        partial.unlink()
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written: {error}; what was written before is kept") from error
    return found


def _written(teacher: Teacher, texts: Sequence[str], parallel: int) -> Iterator[dict[str, Any]]:
    """What the teacher says to ``texts``, ``teacher.texts`` at a time, ``parallel`` of them under way."""
    chunks = [texts[start : start + teacher.texts] for start in range(0, len(texts), teacher.texts)]
    then = time.monotonic()
    with ThreadPoolExecutor(parallel) as pool:
        asked = [pool.submit(teacher.write, chunk) for chunk in chunks]
        try:
            for chunk, future in zip(chunks, asked, strict=True):
                answer, now = future.result(), time.monotonic()
                yield {
                    "outputs": dict(zip(chunk, answer.outputs, strict=True)),
                    "joules": answer.joules,
                    "quality": answer.quality,
                    "elapsed_s": now - then,
                }
                then = now
        finally:
            pool.shutdown(cancel_futures=True)


def _append(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _go_on(partial: Path, found: Targets) -> None:
    """Take what an earlier, interrupted call has written, without a last line that it did not end."""
    if not partial.exists():
        return
    text = partial.read_bytes()
    kept = text[: text.rfind(b"\n") + 1]
    if kept != text:
        os.truncate(partial, len(kept))
    lines = [json.loads(line) for line in kept.splitlines()]
    if lines and lines[0] != found.heading:
        raise TrainingError(f"{partial}: begun as {lines[0]}, not {found.heading}; delete it to begin anew")
    for line in lines[1:]:
        found.add(line)


def _finish(whole: Path, found: Targets, inputs: Sequence[str], columns: tuple[str, str]) -> None:
    """Write the rows, in the order of ``inputs``, and what they are; last the rows, whose file ends the stage."""
    rows: list[Row] = []
    for text in inputs:
        output = (found.outputs[text] or "").strip()
        if output:
            rows.append(dict(zip(columns, (text, output), strict=True)))
    found.rows, found.left_out = len(rows), len(inputs) - len(rows)
    said = {name: value for name, value in asdict(found).items() if name != "outputs"}
    _beside(whole).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    scratch = whole.with_suffix(".scratch")
    with gzip.open(scratch, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scratch.replace(whole)


def _finished(whole: Path, wanted: Targets) -> Targets:
    found = read_targets(whole)
    if found is None or found.heading != wanted.heading:
        raise TrainingError(f"{whole}: there already, and not {wanted.heading}; delete it to have it written anew")
    return found


def read_targets(whole: Path) -> Targets | None:
    """What the file beside the set ``whole`` says of it; None where no teacher wrote it."""
    try:
        return Targets(**json.loads(_beside(whole).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{_beside(whole)}: cannot be read: {error}") from error


def _beside(whole: Path) -> Path:
    return whole.with_name(f"{whole.name.partition('.')[0]}.json")
