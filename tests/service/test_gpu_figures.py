"""The figures of a GPU, taken from a stand-in; and the real ones, where there is a GPU."""

import re
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from energy.account import Attributed, MeterTotal, Totals, Unattributed
from energy.settlement import Reason
from energy.types import Phase, Quality
from service.engine.devices import gpus
from service.engine.engine import engine_settings
from service.gpu_figures import agreement, figures, histogram, integrated_j, load, moves_ms, told
from service.models import load_model
from service.settings import read_settings
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
