"""Runs models on random token ids, and fits what their steps cost. Knows nothing of tasks or HTTP.

Which ids does not matter to what a step costs: only how many there are. On a processor every step is timed; on a GPU
with an energy counter, which tells of windows of 100 ms, batches of one kind run for some of those at a time.
"""

import platform
import random
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from energy.calibration import (
    LEAST_STEPS,
    Calibration,
    CalibrationError,
    Fit,
    Lot,
    fit_lots,
    fit_steps,
    write_calibration,
)
from energy.clock import NS_PER_S, Clock
from energy.meters.base import Meter, Reading, Unavailable
from energy.meters.nvml import open_nvml
from energy.types import Quality, Step
from service.app import calibration_places, open_models
from service.engine.devices import gpus
from service.engine.engine import Engine, engine_settings
from service.engine.loading import runs_on_gpus
from service.engine.types import EncodeItem, Item, Sampling, WriteItem
from service.models import Model
from service.settings import Settings

SECONDS = 20.0
"""For each model."""
_BATCHES = (1, 1, 2, 4, 8, 16, 32)
_LENGTHS = (4, 8, 16, 32, 64, 128)
_WRITTEN = 32
_LOT_BATCHES = (1, 4, 16, 32)
_LOT_LENGTHS = (8, 32, 128)
_LOT_WRITTEN = (2, 24)
"""Few tokens and many, for what is read before the first and what each looks back on grow together."""
_LEAST_LOT_S = 0.8
"""So many seconds hold eight moves of a GPU's counter."""
_CPUINFO = Path("/proc/cpuinfo")


def calibrate(settings: Settings, seconds: float = SECONDS) -> Iterator[str]:
    """Calibrate every model that ``settings`` name, one after the other; yields a line of text on each.

    Raises ``CalibrationError``, and ``OSError`` where it cannot be written.
    """
    one = settings.model_copy(update={"executors": 1, "gpus": settings.gpus[:1]})
    for model in open_models(settings).served.values():
        yield f"{model.name}: running for about {seconds:g} s"
        fit = _fit(model, one, seconds)
        found = Calibration(model.name, model.manifest.revision, machine(), fit)
        path = write_calibration(found, *calibration_places(model, settings.state))
        yield (
            f"{model.name}: {fit.fixed_ns / 1000:.0f} us per pass, {fit.prefill_token_ns / 1000:.1f} per token read, "
            f"{fit.decode_token_ns / 1000:.1f} per token written, {fit.context_token_ns / 1000:.2f} per token of "
            f"context; {fit.steps} steps, R2 {fit.r2:.3f}, median error {fit.held_out_error:.1%} on those held out "
            f"(by default {fit.default_error:.1%}); written to {path}"
        )


def _fit(model: Model, settings: Settings, seconds: float) -> Fit:
    if runs_on_gpus(model.manifest, engine_settings(settings)):
        device = gpus(engine_settings(settings))[0]
        meter = open_nvml([device.index], Clock())
        # Power that is integrated here is no more than a guess between two looks.
        if not isinstance(meter, Unavailable) and all(each.quality is Quality.MEASURED for each in meter.read()):
            return fit_lots(run_lots(model, settings, meter, seconds)[0])
    return fit_steps(run(model, settings, seconds))


def run_lots(model: Model, settings: Settings, meter: Meter, seconds: float) -> tuple[list[Lot], int]:
    """Steps of one model alone: each kind of batch for its part of ``seconds``, from one reading to another of
    ``meter``, which reads one device. Also returns the idle power in microwatts.

    Raises ``CalibrationError`` where the meter cannot be read any more.
    """
    config = model.manifest.config
    longest = config.max_positions // 2
    lengths = sorted({min(length, longest) for length in _LOT_LENGTHS})
    kinds = list(product(_LOT_BATCHES, lengths, _LOT_WRITTEN if config.head == "lm" else (0,)))
    each_s = max(_LEAST_LOT_S, seconds / (len(kinds) + 1))
    steps: list[Step] = []
    engine = Engine({model.name: model}, steps.append, engine_settings(settings))
    try:
        idle_uw = _power_uw(*_watch(meter, each_s))
        lots = []
        for batch, length, written in kinds:
            with asking(engine, model, min(batch, settings.max_concurrent_requests), length, written):
                # The first ones find shapes that were never run.
                time.sleep(each_s / 5)
                began, ended = _watch(meter, each_s)
                while not (chosen := _between(steps, began, ended)):
                    ended = _next_reading(meter)
            lots.append(Lot(chosen, (_power_uw(began, ended) - idle_uw) * (ended.at_ns - began.at_ns) / NS_PER_S))
        return lots, idle_uw
    finally:
        engine.close()


def _between(steps: Sequence[Step], began: Reading, ended: Reading) -> list[Step]:
    return [step for step in steps if began.at_ns < step.ended_ns <= ended.at_ns and step.work is not None]


def _watch(meter: Meter, seconds: float) -> tuple[Reading, Reading]:
    """The first reading from now on, and the first that comes ``seconds`` later."""
    began = _next_reading(meter)
    time.sleep(seconds)
    return began, _next_reading(meter)


def _power_uw(began: Reading, ended: Reading) -> int:
    """In microwatts, of what was counted meanwhile."""
    return (ended.energy_uj - began.energy_uj) * NS_PER_S // (ended.at_ns - began.at_ns)


def _next_reading(meter: Meter) -> Reading:
    first = meter.read()
    while latest := meter.read():
        if first and latest[0].at_ns > first[0].at_ns:
            return latest[0]
        time.sleep(0.0005)
    raise CalibrationError(f"the meter cannot be read any more: {meter.name}")


@contextmanager
def asking(engine: Engine, model: Model, batch: int, length: int, written: int) -> Iterator[None]:
    """All the while ask for ``batch`` items of ``length`` tokens at once, to write so many more."""
    over = threading.Event()

    def ask() -> None:
        draw = random.Random(1)
        while not over.is_set():
            items = [_item(model, str(number), draw, length, written) for number in range(batch)]
            for ticket in engine.submit(model.name, items):
                ticket.future.result()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


def run(model: Model, settings: Settings, seconds: float) -> list[Step]:
    """Steps of one model alone, on one executor, over batches of various sizes and lengths: for ``seconds``, and as
    long as they are too few to be fitted."""
    steps: list[Step] = []
    engine = Engine({model.name: model}, steps.append, engine_settings(settings))
    draw = random.Random(1)
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s or sum(step.work is not None for step in steps) < LEAST_STEPS:
            tickets = engine.submit(model.name, _items(model, draw, settings))
            for ticket in tickets:
                ticket.future.result()
    finally:
        engine.close()
    return steps


def machine() -> str:
    """The processor, as far as the system tells."""
    known = _CPUINFO.exists() and re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    return known[1] if known else platform.processor() or platform.machine()


def _items(model: Model, draw: random.Random, settings: Settings) -> list[Item]:
    config = model.manifest.config
    writes = config.head == "lm"
    limit = config.max_positions - (_WRITTEN if writes and config.architecture != "encoder-decoder" else 0)
    around = draw.choice(_LENGTHS)
    items: list[Item] = []
    for number in range(min(draw.choice(_BATCHES), settings.max_concurrent_requests)):
        length = max(1, min(limit, round(around * draw.uniform(0.5, 1.5))))
        items.append(_item(model, str(number), draw, length, draw.randint(1, _WRITTEN)))
    return items


def _item(model: Model, name: str, draw: random.Random, length: int, written: int) -> Item:
    config = model.manifest.config
    ids = tuple(draw.randrange(config.vocab_size) for _ in range(length))
    return WriteItem(name, ids, Sampling(max_tokens=written)) if config.head == "lm" else EncodeItem(name, ids)
