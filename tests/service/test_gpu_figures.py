"""The figures of a GPU, taken from a stand-in; and the real ones, where there is a GPU."""

import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from energy.account import Attributed, MeterTotal, Totals, Unattributed
from energy.settlement import Reason
from energy.types import Phase, Quality, Work
from service.engine.devices import gpus
from service.engine.engine import engine_settings
from service.gpu_figures import (
    Cell,
    agreement,
    figures,
    fit_joules,
    histogram,
    integrated_j,
    load,
    measure_cells,
    moves_ms,
    told,
)
from service.models import load_model
from service.settings import read_settings
from tests.energy.fakes import step_of
from tests.tiny import write_tiny

MS = 1_000_000


def ticking(ms: int) -> Callable[[], int]:
    """A clock that each look moves by ``ms``."""
    ticks: Iterator[int] = count(0, ms * MS)
    return lambda: next(ticks)


def test_moves_of_a_counter_are_timed() -> None:
    now = ticking(1)
    looks = count()
    # It moves at every twentieth look, a millisecond apart.
    found = moves_ms(lambda: next(looks) // 20, 0.2, now, pause_s=0)
    assert found[:3] == [20.0, 20.0, 20.0]
    assert histogram([1, 20.0, 20.0, 500]).startswith("<5 ms: 1, <15 ms: 0, <25 ms: 2")
    assert histogram([500]).endswith("more ms: 1")


def test_power_is_integrated_by_trapezoids() -> None:
    power_mw = iter([0, *[100_000] * 1000])
    assert integrated_j(lambda: next(power_mw), 0.1, ticking(10)) == pytest.approx(0.5 + 9 * 1.0)


def test_outputs_agree_with_themselves_and_bills_with_the_meter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "halves", "decoder", name="halves", scheme="float16")
    model = load_model(tmp_path / "halves")
    settings = read_settings(state=str(tmp_path), device="cpu", meter="estimate", executors="1")
    assert agreement(model, settings, settings) == 1.0
    requests, totals, counted_j = load(model, settings, 0.3, iter([1000, 4000]).__next__)
    assert requests >= 32
    assert all(total.residual_uj == 0 for total in totals.meters)
    assert counted_j == 3.0


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_joules_of_batches_and_lengths_are_fitted(noise: float) -> None:
    cells = []
    for number, (batch, length) in enumerate((b, n) for b in (1, 4, 16) for n in (8, 32, 128)):
        work = Work(Phase.ENCODE, [str(i) for i in range(batch)], [length] * batch)
        # A hundred passes of 2 mJ and 10 uJ a token; noise turns some of them around.
        active_j = 100 * (0.002 + 1e-5 * batch * length) * (1 + noise * (-1) ** number)
        cells.append(Cell([step_of(work, 0, 1, 1)] * 100, active_j))
    told = fit_joules(cells)
    assert told.startswith("a pass: 2000 uJ above idle, 10.00 per token read, 0.00 per token written") != bool(noise)
    assert told.endswith("R2 1.000, median error 0.0%") != bool(noise)
    assert "9 batches and lengths, 900 passes" in told


def test_batches_and_lengths_are_metered_from_move_to_move(tmp_path: Path) -> None:
    write_tiny(tmp_path / "halves", "classify", name="halves", scheme="float16")
    settings = read_settings(state=str(tmp_path), device="cpu", meter="estimate", executors="1")
    # A counter of 30 W that moves every 20 ms.
    cells = measure_cells(
        load_model(tmp_path / "halves"), settings, lambda: int(time.monotonic() / 0.02) * 600, 10.0, seconds=0.1
    )
    assert len(cells) == 8  # no text is longer than half of what the model holds
    batches = [step.work.tokens for cell in cells for step in cell.steps if step.work]
    assert {len(batch) for batch in batches} == {1, 4, 16, 32}
    assert {max(batch) for batch in batches} == {8, 32}
    # 20 W above idle, over 100 to 120 ms and what a look comes late.
    assert all(2.0 * 0.95 < cell.active_j < 2.4 * 1.5 for cell in cells)


def test_every_device_has_a_line() -> None:
    totals = Totals(
        (MeterTotal("gpu:0", "nvml", 5_000_000, 0),),
        (Attributed("gpu:0", "m", "generate", Phase.DECODE, Quality.MEASURED, 4_000_000),),
        (Unattributed("gpu:0", Reason.IDLE, 1_000_000),),
    )
    (line,) = told(7, totals)
    assert line.startswith("gpu:0 (nvml): 5.0 J, 4.0 J on 7 bills, open 0.0 J, residual 0 uJ")
    assert line.endswith("idle 1.0 J")


@pytest.mark.gpu
def test_the_figures_of_this_machines_gpu(tmp_path: Path) -> None:
    """`pytest -m gpu -s` prints them, with a short load; `python -m service.gpu_figures` takes minutes."""
    if not gpus(engine_settings(read_settings(state=str(tmp_path), device="auto"))):
        pytest.skip("no GPU that CUDA works on")
    import pynvml  # the extra that brings CUDA brings it, too

    pynvml.nvmlInit()
    write_tiny(tmp_path / "halves", "decoder", name="halves", scheme="float16")
    lines = list(figures(load_model(tmp_path / "halves"), 0, 5.0, pynvml))
    print("\n".join(lines))
    assert float(lines[1].rpartition(" ")[2]) > 0.95
    bills = [line for line in lines if "residual" in line]
    assert bills
    assert all("residual 0 uJ" in line for line in bills)
    metered_j = float(re.search(r"^gpu:0 \(nvml\): ([\d.]+) J", "\n".join(bills), re.MULTILINE)[1])
    # Its windows end with the counter's moves, of which the first and the last are some of a hundred.
    assert metered_j == pytest.approx(float(re.search(r"([\d.]+) J$", lines[-1])[1]), rel=0.05)
