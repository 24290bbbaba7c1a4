"""What a GPU does with a model and what its meter sees, as lines for ``docs/LOG.md``. Knows nothing of HTTP.

    python -m service.gpu_figures MODEL [GPU [SECONDS]]

MODEL is the folder of a model stored as float16, GPU a number as NVIDIA counts them (0), SECONDS how long the last
part lasts (300). It needs a GPU, the extra [gpu] and nothing else that computes on it: texts against the processor's;
at rest and under load how often the energy counter moves, and the counter against power integrated over time; the
affine cost of a step over batches and lengths, by durations and by joules, each with its R2; and minutes of load
whose bills are set against the meter, and the meter against the counter read beside it.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from energy.account import Account, Totals
from energy.calibration import CalibrationError, Fit, fit_lots, fit_steps
from energy.clock import NS_PER_S, Clock
from energy.ledger import Ledger
from energy.meters.base import Unavailable
from energy.meters.nvml import open_nvml
from energy.sampler import Sampler
from energy.types import RequestRecord
from service.app import open_account
from service.calibrate import asking, run, run_lots
from service.engine.devices import DeviceUnavailable
from service.engine.engine import Engine, engine_settings
from service.engine.types import EncodeItem, EncodeOutput, Item, Output, Sampling, WriteItem, WriteOutput
from service.metrics import UJ_PER_J
from service.models import Model, load_model
from service.settings import Settings, read_settings

LOAD_S = 300.0
_WATCHED_S = 5.0
_FITTED_S = 20.0
_LENGTH = 20
_AT_ONCE = 32
_BOUNDS_MS = (5, 15, 25, 50, 75, 110)
_MJ_PER_J = 1000


def agreement(model: Model, on_gpu: Settings, on_cpu: Settings) -> float:
    """How far outputs on both agree, mean over some items: of texts the share of tokens before the first difference,
    of logits the cosine."""
    found = []
    for settings in (on_gpu, on_cpu):
        engine = Engine({model.name: model}, lambda step: None, engine_settings(settings))
        try:
            items = [_some_item(model, number) for number in range(_AT_ONCE)]
            found.append([ticket.future.result() for ticket in engine.submit(model.name, items)])
        finally:
            engine.close()
    return float(np.mean([_alike(a, b) for a, b in zip(*found, strict=True)]))


def _alike(a: Output, b: Output) -> float:
    if isinstance(a, WriteOutput) and isinstance(b, WriteOutput):
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(a.output_ids, b.output_ids, strict=False)))
        return len(same) / max(len(a.output_ids), len(b.output_ids), 1)
    assert isinstance(a, EncodeOutput) and isinstance(b, EncodeOutput)
    x, y = a.logits.ravel(), b.logits.ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def moves_ms(
    read: Callable[[], int], seconds: float, now_ns: Callable[[], int] = time.monotonic_ns, pause_s: float = 0.0005
) -> list[float]:
    """Milliseconds between one move of a counter and the next, as often as it moves in ``seconds``."""
    end_ns = now_ns() + round(seconds * NS_PER_S)
    last, moved_ns, found = read(), None, []
    while (at_ns := now_ns()) < end_ns:
        value = read()
        if value != last:
            if moved_ns is not None:
                found.append((at_ns - moved_ns) / 1e6)
            last, moved_ns = value, at_ns
        time.sleep(pause_s)
    return found


def histogram(values: Sequence[float]) -> str:
    """How many lie below each bound, and above the last."""
    counts = Counter(next((f"<{bound}" for bound in _BOUNDS_MS if value < bound), "more") for value in values)
    return ", ".join(f"{name} ms: {counts[name]}" for name in (*(f"<{bound}" for bound in _BOUNDS_MS), "more"))


def integrated_j(read_mw: Callable[[], int], seconds: float, now_ns: Callable[[], int] = time.monotonic_ns) -> float:
    """Power integrated over ``seconds``, by trapezoids."""
    start_ns = at_ns = now_ns()
    last_mw, total = read_mw(), 0.0
    while at_ns < start_ns + seconds * NS_PER_S:
        time.sleep(0.001)
        next_ns, next_mw = now_ns(), read_mw()
        total += (last_mw + next_mw) / 2 * (next_ns - at_ns) / NS_PER_S
        at_ns, last_mw = next_ns, next_mw
    return total / _MJ_PER_J


def load(
    model: Model, settings: Settings, seconds: float, read_mj: Callable[[], int] = lambda: 0
) -> tuple[int, Totals, float]:
    """Ask for as much as a service with many clients, and bill it: how many requests, where the energy went, and the
    joules that a counter, read beside, has told meanwhile."""
    account: Account = open_account(settings, Ledger(settings.ledger))
    before_mj = read_mj()
    with Sampler(account, settings.sample_interval_ms / 1000):
        engine = Engine({model.name: model}, account.record, engine_settings(settings))
        try:
            number, end_s = 0, time.monotonic() + seconds
            while time.monotonic() < end_s:
                items = [_some_item(model, number + i) for i in range(_AT_ONCE)]
                number += len(items)
                for ticket in engine.submit(model.name, items):
                    ticket.future.result()
                for item in items:
                    account.close(RequestRecord(item.request_id, model.manifest.tasks[0], model.name, "ok"))
        finally:
            engine.close()
    account.shutdown()
    return number, account.totals(), (read_mj() - before_mj) / _MJ_PER_J


def told(requests: int, totals: Totals) -> Iterator[str]:
    """What ``load`` found, a line for each device."""
    for total in totals.meters:
        metered_uj = total.settled_uj + total.open_uj + total.residual_uj
        billed_uj = sum(share.energy_uj for share in totals.attributed if share.device == total.device)
        rest = [
            f"{each.reason} {each.energy_uj / UJ_PER_J:.1f} J"
            for each in totals.unattributed
            if each.device == total.device
        ]
        yield (
            f"{total.device} ({total.source}): {metered_uj / UJ_PER_J:.1f} J, {billed_uj / UJ_PER_J:.1f} J on "
            f"{requests} bills, open {total.open_uj / UJ_PER_J:.1f} J, residual {total.residual_uj} uJ; "
            f"unattributed: {', '.join(rest)}"
        )


def figures(model: Model, gpu: int, seconds: float, library: Any) -> Iterator[str]:
    """Every line. ``library`` is the module ``pynvml``, initialised.

    No part lasts longer than ``seconds``, batches of every kind apart.
    """
    handle = library.nvmlDeviceGetHandleByIndex(gpu)
    watched_s = min(_WATCHED_S, seconds)
    with TemporaryDirectory() as state:
        on_gpu = read_settings(state=state, device="cuda", gpus=str(gpu))
        on_cpu = on_gpu.model_copy(update={"device": "cpu"})
        yield f"{library.nvmlDeviceGetName(handle)}, {model.name}"
        yield f"agreement with the processor: {agreement(model, on_gpu, on_cpu):.4f}"

        def counter() -> int:
            return int(library.nvmlDeviceGetTotalEnergyConsumption(handle))

        def watched(when: str) -> Iterator[str]:
            yield f"{when}, moves of the energy counter: {histogram(moves_ms(counter, watched_s))}"
            before_mj = counter()
            power_j = integrated_j(lambda: int(library.nvmlDeviceGetPowerUsage(handle)), watched_s)
            counter_j = (counter() - before_mj) / _MJ_PER_J
            yield f"{when}, {watched_s:g} s: counter {counter_j:.1f} J, integrated power {power_j:.1f} J"

        yield from watched("at rest")
        engine = Engine({model.name: model}, lambda step: None, engine_settings(on_gpu))
        with closing(engine), asking(engine, model, _AT_ONCE, _LENGTH, _LENGTH):
            yield from watched("under load")
        one = on_gpu.model_copy(update={"executors": 1})
        yield _told("durations of steps", fit_steps(run(model, one, min(_FITTED_S, seconds))))
        meter = open_nvml([gpu], Clock(), library)
        if isinstance(meter, Unavailable):
            raise CalibrationError(meter.reason)
        lots, idle_uw = run_lots(model, one, meter, _FITTED_S)
        yield _told("joules above idle of batches of a kind", fit_lots(lots))
        uj_per_ns = sum(lot.active_uj for lot in lots) / sum(step.load_ns for lot in lots for step in lot.steps)
        yield f"idle {idle_uw / 1e6:.1f} W, running {uj_per_ns * 1e3:.1f} W above that"
        requests, totals, counted_j = load(model, on_gpu, seconds, counter)
        yield from told(requests, totals)
        yield f"the counter read beside them: {counted_j:.1f} J"


def _told(what: str, fit: Fit) -> str:
    return (
        f"{what}: {fit.fixed_ns / 1000:.0f} us a pass, {fit.prefill_token_ns / 1000:.2f} per token read, "
        f"{fit.decode_token_ns / 1000:.2f} per token written, {fit.context_token_ns / 1000:.3f} per token of context; "
        f"{fit.steps} steps, of those left out R2 {fit.r2:.3f}, median error {fit.held_out_error:.1%}"
    )


def _some_item(model: Model, number: int) -> Item:
    """A request for ``model``, of twenty tokens and as many to write; another for each number."""
    config = model.manifest.config
    ids = tuple(
        5 + (number * 31 + i * 7) % (config.vocab_size - 5) for i in range(min(_LENGTH, config.max_positions // 2))
    )
    if config.head == "lm":
        return WriteItem(f"r{number}", ids, Sampling(max_tokens=_LENGTH))
    return EncodeItem(f"r{number}", ids)


def main(arguments: Sequence[str]) -> int:
    """Print the figures."""
    try:
        import pynvml
    except ImportError:
        print("nvidia-ml-py is not installed; it comes with the extra [gpu]", file=sys.stderr)
        return 1
    gpu = int(arguments[1]) if len(arguments) > 1 else 0
    seconds = float(arguments[2]) if len(arguments) > 2 else LOAD_S
    try:
        pynvml.nvmlInit()
        for line in figures(load_model(Path(arguments[0])), gpu, seconds, pynvml):
            print(line, flush=True)
    except (DeviceUnavailable, CalibrationError, pynvml.NVMLError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
