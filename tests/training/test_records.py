"""The log and the cost of a run, exactly, on a meter and a clock that the tests hold."""

import json

import pytest

from energy.meters.base import Reading, Unavailable
from energy.types import Quality
from models.manifest import Stage
from training.errors import TrainingError
from training.records import LOG, Progress, Recorder, read_lineage, read_log, write_ancestors, write_stage


class Bench:
    """A clock in seconds, and a meter that counts 10 J each of them."""

    def __init__(self):
        self.now_s = 100.0

    def clock_s(self):
        return self.now_s

    def read(self):
        return (Reading("cpu", "fake", 0, round(self.now_s * 10e6), 0, Quality.MEASURED),)


def advance(bench, recorder, progress, *, steps, seconds):
    bench.now_s += seconds
    progress.step += steps
    progress.tokens += 100 * steps
    progress.loss = 2.0
    recorder.write(progress, 0.1)


def test_a_log_tells_totals_and_the_rates_of_its_interval(tmp_path):
    bench, progress = Bench(), Progress()
    recorder = Recorder(tmp_path, progress, bench, bench.clock_s)
    advance(bench, recorder, progress, steps=2, seconds=4)
    advance(bench, recorder, progress, steps=1, seconds=1)
    assert read_log(tmp_path)[-1] == {
        "step": 3,
        "tokens": 300,
        "elapsed_s": 5.0,
        "joules": 50.0,
        "loss": 2.0,
        "learning_rate": 0.1,
        "tokens_per_s": 100.0,
        "joules_per_token": 0.1,
    }
    assert recorder.rates == "100 tokens/s, 0.1 J/token"
    assert (progress.joules, progress.quality) == (50.0, "measured")


def test_what_was_lost_after_a_checkpoint_was_spent_all_the_same(tmp_path):
    bench, progress = Bench(), Progress()
    recorder = Recorder(tmp_path, progress, bench, bench.clock_s)
    advance(bench, recorder, progress, steps=1, seconds=1)
    checkpoint = Progress(step=1, tokens=100, elapsed_s=1.0, joules=10.0)
    advance(bench, recorder, progress, steps=1, seconds=3)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 3, "tok')  # killed while it wrote
    bench.now_s += 1000
    resumed = Recorder(tmp_path, checkpoint, bench, bench.clock_s)
    advance(bench, resumed, checkpoint, steps=1, seconds=2)
    found = [(line["step"], line["elapsed_s"], line["joules"]) for line in read_log(tmp_path)]
    assert found == [(1, 1.0, 10.0), (2, 6.0, 60.0)]


def test_a_run_without_a_meter_says_so(tmp_path):
    bench, progress = Bench(), Progress()
    recorder = Recorder(tmp_path, progress, Unavailable("none"), bench.clock_s)
    advance(bench, recorder, progress, steps=1, seconds=2)
    (line,) = read_log(tmp_path)
    assert line["joules"] is line["joules_per_token"] is progress.joules is None
    assert progress.quality == "unavailable"
    assert recorder.rates == "50 tokens/s, unavailable J/token"


def test_a_log_that_is_none_is_said(tmp_path):
    (tmp_path / LOG).write_text("step 1\n")
    with pytest.raises(TrainingError, match=r"log\.jsonl: not a log of a run"):
        read_log(tmp_path)


def test_a_stage_is_read_back_with_those_before_it(tmp_path):
    stage = Stage.model_validate(
        {
            "name": "student",
            "kind": "distil",
            "parent": "base",
            "teacher": "big",
            "data": ["a", "b (more)"],
            "parameters": 10,
            "steps": 2,
            "tokens": 30,
            "elapsed_s": 4.0,
            "joules": 5.0,
            "gco2e": 0.1,
            "quality": "estimated",
            "device": "cpu",
            "loss": 1.5,
            "teacher_joules": 7.0,
        }
    )
    base = stage.model_copy(update={"name": "base", "parent": None})
    assert read_lineage(tmp_path) == ()
    write_stage(tmp_path, stage)
    assert read_lineage(tmp_path) == (stage,)
    assert json.loads((tmp_path / "stage.json").read_text())["data"] == ["a", "b (more)"]
    write_ancestors(tmp_path, [base])
    assert read_lineage(tmp_path) == (base, stage)
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(TrainingError, match="its stage cannot be read"):
        read_lineage(tmp_path)
