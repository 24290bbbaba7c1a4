"""What a run tells of itself: how far it is, what it cost, its log, its stage. Knows nothing of models or data."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from energy.carbon import Carbon
from energy.meters.base import Meter
from energy.requests import weakest
from energy.types import Quality
from models.manifest import Stage
from training.errors import TrainingError, writing

LOG = "log.jsonl"
"""One object per interval, appended while the run goes on."""
STAGE = "stage.json"
"""What the run was, written when it has ended."""
ANCESTORS = "ancestors.json"
"""The stages that its first weights come from, oldest first; absent where there are none."""
_STAGES = TypeAdapter(tuple[Stage, ...])


@dataclass
class Progress:
    """How far a run is and what it has cost, over all of its restarts."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    joules: float | None = 0.0
    """Of this machine while the run held it, idle included; None where there is no meter."""
    quality: str = Quality.UNAVAILABLE.value
    loss: float = math.nan
    """Exponential mean over about 50 steps."""
    device: str = "cpu"


class Recorder:
    """Adds up what a run costs and writes its log.

    What an interrupted run spent after its last checkpoint is spent: those lines leave the log, their cost stays.
    """

    def __init__(
        self,
        run: Path,
        progress: Progress,
        meter: Meter,
        clock_s: Callable[[], float] = time.monotonic,
        *,
        writes: bool = True,
    ) -> None:
        """Begin to count for ``run``, which goes on from ``progress``. One process of a run ``writes`` its log."""
        self._path, self._meter, self._clock_s, self._writes = run / LOG, meter, clock_s, writes
        lines = read_log(run)
        if lines and lines[-1]["elapsed_s"] > progress.elapsed_s:
            progress.elapsed_s, progress.joules = lines[-1]["elapsed_s"], lines[-1]["joules"]
        if writes:
            kept = [line for line in lines if line["step"] <= progress.step]
            write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._before, self._line = replace(progress), replace(progress)
        self._started_s = clock_s()
        self._begun_uj = {reading.device: reading.energy_uj for reading in meter.read()}
        self.rates = ""
        """Tokens a second and joules a token of the last interval, for a person."""

    def update(self, progress: Progress) -> None:
        """Put into ``progress`` what the run has cost up to now."""
        progress.elapsed_s = self._before.elapsed_s + self._clock_s() - self._started_s
        now = [reading for reading in self._meter.read() if reading.device in self._begun_uj]
        if not now or self._before.joules is None:
            progress.joules, progress.quality = None, Quality.UNAVAILABLE.value
            return
        spent_uj = sum(reading.energy_uj - self._begun_uj[reading.device] for reading in now)
        progress.joules = self._before.joules + spent_uj / 1e6
        progress.quality = weakest(reading.quality for reading in now).value

    def write(self, progress: Progress, learning_rate: float) -> None:
        """Update ``progress`` and append it to the log; the rates are those since the last line."""
        self.update(progress)
        tokens, seconds = progress.tokens - self._line.tokens, progress.elapsed_s - self._line.elapsed_s
        joules_per_token = None
        if progress.joules is not None and self._line.joules is not None and tokens:
            joules_per_token = (progress.joules - self._line.joules) / tokens
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "elapsed_s": progress.elapsed_s,
            "joules": progress.joules,
            "loss": progress.loss,
            "learning_rate": learning_rate,
            "tokens_per_s": tokens / seconds if seconds > 0 else None,
            "joules_per_token": joules_per_token,
        }
        if self._writes:
            self._append(line)
        cost = "unavailable J/token" if joules_per_token is None else f"{joules_per_token:.3g} J/token"
        self.rates = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, {cost}"
        self._line = replace(progress)

    def _append(self, line: dict[str, Any]) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. A last line that a kill tore is left out. Raises ``TrainingError``."""
    try:
        text = (run / LOG).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    *lines, _ = text.split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise TrainingError(f"{run / LOG}: not a log of a run: {error}") from error


def write_ancestors(run: Path, ancestors: Sequence[Stage]) -> None:
    """Keep the stages that ``run`` begins with, which their own folder may forget. Raises ``TrainingError``."""
    write_whole(run / ANCESTORS, _STAGES.dump_json(tuple(ancestors), indent=1).decode() + "\n")


def write_stage(run: Path, stage: Stage) -> None:
    """Keep what ``run`` was. Raises ``TrainingError``."""
    write_whole(run / STAGE, stage.model_dump_json(indent=1) + "\n")


def read_lineage(run: Path) -> tuple[Stage, ...]:
    """The stages that led to a run's weights, its own last; empty where it has not ended. Raises ``TrainingError``."""
    if not (run / STAGE).exists():
        return ()
    try:
        stage = Stage.model_validate_json((run / STAGE).read_bytes())
        path = run / ANCESTORS
        return (*_STAGES.validate_json(path.read_bytes()), stage) if path.exists() else (stage,)
    except (OSError, ValidationError) as error:
        raise TrainingError(f"{run}: its stage cannot be read: {error}") from error


def gco2e(joules: float | None) -> float | None:
    """Grams of CO2e at the world's average grid."""
    return None if joules is None else round(Carbon().gco2e(round(joules * 1e6), 0.0), 3)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises ``TrainingError``."""
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
