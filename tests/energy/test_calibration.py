import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest

from energy.attribution import Coefficients
from energy.calibration import (
    Calibration,
    CalibrationError,
    Fit,
    Lot,
    fit_lots,
    fit_steps,
    read_calibration,
    write_calibration,
)
from energy.types import Phase, Step, Work
from tests.energy.fakes import step_of

FIT = Fit(100_000.0, 50_000.0, 80_000.0, 400.0, 0.99, 0.02, 0.2, 300)


def steps(
    count: int,
    noise: float = 0.0,
    phases: tuple[Phase, ...] = (Phase.PREFILL, Phase.DECODE),
    device: str = "cpu:0",
) -> list[Step]:
    """Steps that cost 0.1 ms a pass, and 50 us a token read, 80 us a token written and 0.4 us a token of context."""
    draw = Random(3)
    made = []
    for _ in range(count):
        phase, rows = draw.choice(phases), draw.choice([1, 2, 8, 32])
        names = [f"r{i}" for i in range(rows)]
        if phase is Phase.DECODE:
            passes = draw.choice([1, 1, 4])
            work = Work(phase, names, [1] * rows, [draw.randint(1, 200) for _ in names])
            padding, token_ns = 0, 80_000
        else:
            lengths = [draw.randint(1, 64) for _ in range(rows)]
            work = Work(phase, names, lengths)
            padding, token_ns, passes = max(lengths) * rows - sum(lengths), 50_000, 1
        load_ns = 0
        for number in range(passes):
            tokens = sum(work.tokens) + padding
            context_tokens = sum(work.context_tokens) + number * sum(work.tokens)
            load_ns += 100_000 + token_ns * tokens + 400 * context_tokens
        load_ns = round(load_ns * draw.uniform(1 - noise, 1 + noise))
        made.append(step_of(work, 0, 2 * load_ns, load_ns, device, passes=passes, padding_tokens=padding))
    return made


def test_finds_what_steps_cost() -> None:
    fit = fit_steps(steps(300))
    found = (fit.fixed_ns, fit.prefill_token_ns, fit.decode_token_ns, fit.context_token_ns)
    assert found == pytest.approx((100_000, 50_000, 80_000, 400), rel=1e-6)
    assert fit.r2 == pytest.approx(1)
    assert fit.held_out_error < 1e-6 < fit.default_error
    assert fit.coefficients == Coefficients(100_000_000, 50_000_000, 80_000_000, 400_000)


def test_noise_is_seen_in_the_held_out_steps() -> None:
    fit = fit_steps(steps(300, noise=0.2))
    assert 0.05 < fit.held_out_error < 0.15
    assert fit.decode_token_ns == pytest.approx(80_000, rel=0.1)
    assert 0.9 < fit.r2 < 1


def test_a_gpu_costs_time_and_not_cpu_time() -> None:
    fit = fit_steps(steps(300, device="gpu:0"))
    assert fit.decode_token_ns == pytest.approx(160_000, rel=1e-6)


def test_padding_costs_nothing_where_texts_are_packed() -> None:
    draw, packed = Random(5), []
    for _ in range(90):
        lengths = [draw.randint(1, 64) for _ in range(draw.choice([1, 2, 8]))]
        padding = len(lengths) * max(lengths) - sum(lengths)
        work = Work(Phase.ENCODE, [f"r{i}" for i in range(len(lengths))], lengths)
        packed.append(step_of(work, 0, 1, 100_000 + 40_000 * sum(lengths), padding_tokens=padding))
    fit = fit_steps(packed)
    assert (fit.fixed_ns, fit.prefill_token_ns) == pytest.approx((100_000, 40_000), rel=1e-6)
    # The same as prompts of a decoder, which reads their padding too.
    read = [
        replace(step, work=Work(Phase.PREFILL, step.work.request_ids, step.work.tokens))
        for step in packed
        if step.work
    ]
    assert fit_steps(read).held_out_error > 0.02


def test_a_phase_that_never_ran_is_taken_to_cost_what_the_other_does() -> None:
    fit = fit_steps(steps(90, phases=(Phase.PREFILL,)))
    assert (fit.decode_token_ns, fit.context_token_ns) == (0, 0)
    assert fit.coefficients.decode_token == fit.coefficients.prefill_token == pytest.approx(50_000_000, rel=1e-6)


def test_nothing_costs_less_than_nothing() -> None:
    # Large steps that cost less per token than small ones drive the plain least squares below zero.
    odd = [replace(step, load_ns=max(1, 10**9 // step.cpu_ns)) for step in steps(90)]
    fit = fit_steps(odd)
    assert min(fit.fixed_ns, fit.prefill_token_ns, fit.decode_token_ns, fit.context_token_ns) >= 0
    assert fit.coefficients.fixed >= 1


def test_too_few_steps_are_no_measurement() -> None:
    with pytest.raises(CalibrationError, match="29 steps"):
        fit_steps([*steps(29), step_of(None, 0, 9, 9)])


def lots(noise: float = 0.0) -> list[Lot]:
    """Batches of every kind on a GPU: 2 mJ a pass, 10 uJ a token read, 20 written, 0.1 of context."""
    found = []
    for number, (rows, length, reads) in enumerate(product([1, 4, 16], [8, 32, 128], [10, 30])):
        names = [f"r{i}" for i in range(rows)]
        reading = step_of(Work(Phase.PREFILL, names, [length] * rows), 0, 3_000_000, 1, "gpu:0")
        writing = step_of(Work(Phase.DECODE, names, [1] * rows, [length] * rows), 0, 1_000_000, 1, "gpu:0")
        read_uj, written_uj = 2000 + rows * length * 10, 2000 + rows * (20 + 0.1 * length)
        taken_uj = (reads * read_uj + 30 * written_uj) * (1 + noise * (-1) ** number)
        found.append(Lot([reading] * reads + [writing] * 30, taken_uj))
    return found


def test_finds_what_lots_of_steps_took_together() -> None:
    fit = fit_lots(lots())
    # In nanoseconds that all of it lasted: 9 lots of 60 ms and 9 of 120.
    ns_per_uj = 9 * 180_000_000 / sum(lot.active_uj for lot in lots())
    found = [fit.fixed_ns, fit.prefill_token_ns, fit.decode_token_ns, fit.context_token_ns]
    assert [each / ns_per_uj for each in found] == pytest.approx([2000, 10, 20, 0.1], rel=1e-6)
    assert (fit.r2, fit.steps) == (pytest.approx(1), 9 * 100)
    assert fit.held_out_error < 1e-6 < fit.default_error


def test_noise_is_seen_in_the_lots_that_are_left_out() -> None:
    fit = fit_lots(lots(noise=0.2))
    assert 0.1 < fit.held_out_error < 0.5
    assert fit.r2 < 0.95


def test_lots_that_tell_nothing_are_no_measurement() -> None:
    with pytest.raises(CalibrationError, match="5 kinds of batches"):
        fit_lots([*lots()[:5], Lot([], 1000.0)])
    with pytest.raises(CalibrationError, match="no more than at rest"):
        fit_lots([*lots(), Lot(lots()[0].steps, 0.0)])


def test_is_read_as_it_was_written(tmp_path: Path) -> None:
    beside, elsewhere = tmp_path / "model" / "energy.json", tmp_path / "state" / "tiny.json"
    assert read_calibration("tiny", "1", beside, elsewhere) is None
    calibration = Calibration("tiny", "1", "a processor", FIT)
    assert write_calibration(calibration, beside, elsewhere) == beside
    assert read_calibration("tiny", "1", beside, elsewhere) == calibration
    assert [path.name for path in beside.parent.iterdir()] == ["energy.json"]


def test_a_read_only_model_has_it_elsewhere_until_it_can_be_written(tmp_path: Path) -> None:
    beside, elsewhere = tmp_path / "model" / "energy.json", tmp_path / "state" / "tiny.json"
    # Root may write anywhere, but not below a file.
    beside.parent.write_text("no folder")
    calibration = Calibration("tiny", "1", "a processor", FIT)
    assert write_calibration(calibration, beside, elsewhere) == elsewhere
    assert read_calibration("tiny", "1", beside, elsewhere) == calibration
    beside.parent.unlink()
    again = replace(calibration, machine="another")
    assert write_calibration(again, beside, elsewhere) == beside
    assert read_calibration("tiny", "1", beside, elsewhere) == again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"revision": "2"}, "revision 2"),
        ({"format_version": 9}, "format_version 9"),
        ({"fit": {}}, "run `wattle calibrate` again"),
        ({"fit": {**{name: getattr(FIT, name) for name in Fit.__slots__}, "fixed_ns": -1}}, "negative"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "energy.json"
    write_calibration(Calibration("tiny", "1", "a processor", FIT), path, tmp_path / "elsewhere")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CalibrationError, match=words):
        read_calibration("tiny", "1", path, tmp_path / "elsewhere")
    path.write_text("{")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration("tiny", "1", path, tmp_path / "elsewhere")
