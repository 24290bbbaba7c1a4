"""What steps cost is measured on this machine, and on a GPU that is not there."""

import time
from collections.abc import Mapping
from math import inf
from pathlib import Path

import pytest

import wattle
from energy.calibration import CalibrationError
from energy.meters.base import Reading, Unavailable
from energy.types import Quality, Step
from service import calibrate as calibrating
from service.app import calibration_places, read_coefficients
from service.calibrate import calibrate
from service.engine import loading
from service.engine.devices import CPU
from service.engine.engine import Engine, Recorder
from service.engine.settings import EngineSettings
from service.models import Model, Models, load_model
from service.settings import Settings
from tests.tiny import Kind, write_tiny


def test_a_model_is_calibrated_and_the_service_knows(tmp_path: Path) -> None:
    write_tiny(tmp_path / "writes", "decoder", name="writes")
    settings = Settings(models=(tmp_path / "writes",), state=tmp_path)
    *_, line = calibrate(settings, seconds=1.0)
    model = load_model(tmp_path / "writes")
    beside, _ = calibration_places(model, tmp_path)
    assert line.startswith("writes: ") and line.endswith(str(beside))
    models = Models({model.name: model})
    coefficients = read_coefficients(models.served.values(), tmp_path)["writes"]
    assert coefficients.decode_token > 0 and coefficients.fixed > 0
    # It is no part of the artefact: the manifest still verifies, and a new one leaves it out.
    assert beside.name not in model.manifest.files
    beside.write_text("{}")
    assert read_coefficients(models.served.values(), tmp_path) == {}
    beside.unlink()


class Counted(Engine):
    """Counts the passes of all engines."""

    passes = 0

    def __init__(self, models: Mapping[str, Model], recorder: Recorder, settings: EngineSettings) -> None:
        def record(step: Step) -> None:
            Counted.passes += step.passes if step.work else 0
            recorder(step)

        super().__init__(models, record, settings)


class TickingMeter:
    """What a counter would tell, if a pass took 20 mJ beside 10 W at rest: every 10 ms."""

    name, source = "a counter", "nvml"
    idle_uw: Mapping[str, int] = {}

    def __init__(self, reads: float = inf) -> None:
        self._left, self._latest = reads, self._now()

    def _now(self) -> Reading:
        at_ns = time.monotonic_ns()
        energy_uj = at_ns // 100 + Counted.passes * 20_000
        return Reading("gpu:0", "nvml", at_ns, energy_uj, 10_000_000, Quality.MEASURED)

    def read(self) -> tuple[Reading, ...]:
        self._left -= 1
        if self._left < 0:
            return ()
        if time.monotonic_ns() - self._latest.at_ns >= 10_000_000:
            self._latest = self._now()
        return (self._latest,)


@pytest.mark.parametrize("kind, count", [("decoder", 4 * 2 * 2), ("classify", 4 * 2)])
def test_on_a_gpu_its_counter_is_what_a_model_is_calibrated_by(
    kind: Kind, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Made of the processor's memory, and named as the first GPU.
    for module in (loading, calibrating):
        monkeypatch.setattr(module, "gpus", lambda settings: (CPU,))
    monkeypatch.setattr(calibrating, "_LEAST_LOT_S", 0.1)
    monkeypatch.setattr(calibrating, "Engine", Counted)
    write_tiny(tmp_path / "halves", kind, name="halves", scheme="float16")
    settings, model = Settings(models=(tmp_path / "halves",), state=tmp_path), load_model(tmp_path / "halves")
    lots, idle_uw = calibrating.run_lots(model, settings, TickingMeter(), 0.1)
    assert idle_uw == pytest.approx(10_000_000, rel=1e-4)
    assert len(lots) == count  # no text is longer than half of what the model holds
    for lot in lots:
        assert {step.device for step in lot.steps} == {"gpu:0"}
        # But for passes at its ends.
        passes = sum(step.passes for step in lot.steps)
        assert lot.active_uj == pytest.approx(passes * 20_000, rel=0.2, abs=60 * 20_000)
    batches = {len(step.work.tokens) for lot in lots for step in lot.steps if step.work}
    assert {1, 4, 16, 32} <= batches
    monkeypatch.setattr(calibrating, "open_nvml", lambda indices, clock: TickingMeter())
    *_, line = calibrate(settings, seconds=0.1)
    beside, _ = calibration_places(model, tmp_path)
    assert line.endswith(str(beside))
    assert read_coefficients([model], tmp_path)["halves"].fixed > 0
    monkeypatch.setattr(calibrating, "open_nvml", lambda indices, clock: TickingMeter(reads=2))
    with pytest.raises(CalibrationError, match="cannot be read any more: a counter"):
        list(calibrate(settings, seconds=0.1))
    # Without a counter steps are timed.
    monkeypatch.setattr(calibrating, "open_nvml", lambda indices, clock: Unavailable("no driver"))
    # However short the time: enough of them run.
    *_, line = calibrate(settings, seconds=0.0)
    assert line.endswith(str(beside))


def test_without_the_gpu_that_is_asked_for_nothing_is_calibrated_but_meters_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("service.engine.devices._works", lambda device, says_why: False)
    for name, value in {"DEVICE": "cuda", "GPUS": "7", "STATE": str(tmp_path), "METER": "estimate"}.items():
        monkeypatch.setenv(f"WATTLE_{name}", value)
    write_tiny(tmp_path / "halves", "decoder", scheme="float16")
    assert wattle.main(["calibrate", "--models", str(tmp_path / "halves")]) == 1
    assert "CUDA does not work on GPU 7" in capsys.readouterr().err
    assert wattle.main(["meters", "--watts-per-core", "5"]) == 0
