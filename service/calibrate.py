"""Runs models on random token ids, and fits what their steps cost. Knows nothing of tasks or HTTP.

Which ids does not matter to what a step costs: only how many there are.
"""

import platform
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

from energy.calibration import Calibration, fit_steps, write_calibration
from energy.types import Step
from service.app import calibration_places, open_models
from service.engine.engine import Engine, engine_settings
from service.engine.types import EncodeItem, Item, Sampling, WriteItem
from service.models import Model
from service.settings import Settings

SECONDS = 20.0
"""For each model."""
_BATCHES = (1, 1, 2, 4, 8, 16, 32)
_LENGTHS = (4, 8, 16, 32, 64, 128)
_WRITTEN = 32
_CPUINFO = Path("/proc/cpuinfo")


def calibrate(settings: Settings, seconds: float = SECONDS) -> Iterator[str]:
    """Calibrate every model that ``settings`` name, one after the other; yields a line of text on each.

    Raises ``CalibrationError``, and ``OSError`` where it cannot be written.
    """
    one = settings.model_copy(update={"executors": 1})
    for model in open_models(settings).served.values():
        yield f"{model.name}: running for {seconds:g} s"
        fit = fit_steps(run(model, one, seconds))
        found = Calibration(model.name, model.manifest.revision, machine(), fit)
        path = write_calibration(found, *calibration_places(model, settings.state))
        yield (
            f"{model.name}: {fit.fixed_ns / 1000:.0f} us per pass, {fit.prefill_token_ns / 1000:.1f} per token read, "
            f"{fit.decode_token_ns / 1000:.1f} per token written, {fit.context_token_ns / 1000:.2f} per token of "
            f"context; {fit.steps} steps, R2 {fit.r2:.3f}, median error {fit.held_out_error:.1%} on those held out "
            f"(by default {fit.default_error:.1%}); written to {path}"
        )


def run(model: Model, settings: Settings, seconds: float) -> list[Step]:
    """Steps of one model alone, on one executor, over batches of various sizes and lengths."""
    steps: list[Step] = []
    engine = Engine({model.name: model}, steps.append, engine_settings(settings))
    draw = random.Random(1)
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
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
        ids = tuple(draw.randrange(config.vocab_size) for _ in range(length))
        if writes:
            items.append(WriteItem(str(number), ids, Sampling(max_tokens=draw.randint(1, _WRITTEN))))
        else:
            items.append(EncodeItem(str(number), ids))
    return items
