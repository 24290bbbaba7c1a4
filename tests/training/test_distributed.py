"""Two gloo processes learn what one learns, and write it once; a run goes on in any layout."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from energy.meters.base import Reading
from energy.types import Quality
from tests.training.ranks import CASES, carry_out
from training import distributed
from training.checkpoint import CHECKPOINT
from training.data import deal
from training.distributed import HostMeters, Layout
from training.records import read_log

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def together(tmp_path_factory, data, trunk_package):
    """The runs of two processes."""

    def start(out):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        path = os.pathsep.join([str(ROOT), *sys.path])
        return subprocess.run(
            [*command, "tests.training.ranks", str(data), str(out)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
            capture_output=True,
            text=True,
            timeout=140,
            check=False,
        )

    out = tmp_path_factory.mktemp("together")
    done = start(out)
    if f"exitcode: {-signal.SIGABRT}" in done.stderr:
        # A thread of gloo's that meets an error ends its process; no error of ours does that.
        print(done.stderr)
        out = tmp_path_factory.mktemp("together")
        done = start(out)
    assert done.returncode == 0, done.stderr
    return out


def checkpoint(runs):
    (path,) = runs.glob(f"*/{CHECKPOINT}")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(together, tmp_path, data, case):
    alone = carry_out(case, data, tmp_path, Layout(), fsdp=False, micro_batch_tokens=None, recompute=False)
    found, wanted = checkpoint(together / case), checkpoint(tmp_path)
    assert found["progress"]["step"] == wanted["progress"]["step"] == alone.progress.step > 3
    assert found["progress"]["tokens"] == alone.progress.tokens
    # float16 rounds: a last bit there is a third one here.
    rough = "float16" in case
    assert found["progress"]["loss"] == pytest.approx(alone.progress.loss, rel=1e-3 if rough else 1e-5)
    torch.testing.assert_close(
        found["model"], wanted["model"], rtol=0, atol=5e-3 if rough else 1e-5, msg=lambda said: f"{case}: {said}"
    )


@pytest.mark.parametrize("name", ["goes on alone", "goes on as ddp"])
def test_a_run_goes_on_in_another_layout(together, tmp_path, data, name):
    whole = checkpoint(together / "ddp")
    if name == "goes on alone":
        assert checkpoint(together / name)["progress"]["step"] == 3
        carry_out("ddp", data, together / name, Layout())
    found = checkpoint(together / name)
    torch.testing.assert_close(found["model"], whole["model"], rtol=0, atol=1e-5)
    for one, other in zip(found["optimisers"], whole["optimisers"], strict=True):
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=1e-5)


def test_one_process_writes_for_all(together):
    (run,) = (together / "ddp").iterdir()
    steps = [line["step"] for line in read_log(run)]
    assert steps == list(range(1, len(steps) + 1))
    stage = json.loads((run / "stage.json").read_text())
    assert (stage["steps"], stage["device"]) == (len(steps), "2 x cpu")
    assert not list(run.glob("*.partial"))


def test_each_host_s_meters_count_once(together, monkeypatch):
    said = [json.loads((together / f"joules.{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1], "all processes know what all hosts have taken"
    assert all(joules > 0 for joules in said[0].values())

    def gather(found, own):
        """Three processes on two hosts; the second process is another one of the first host."""
        reading = Reading("cpu", "fake", 0, 7_000_000, 0, Quality.MEASURED)
        found[:] = [own, (1, ()), (0, (reading,) if second_host_has_a_meter else ())]

    monkeypatch.setattr(distributed.dist, "all_gather_object", gather)
    meters = HostMeters(Layout(world=3, local_world=2))
    second_host_has_a_meter = True
    names = [reading.device for reading in meters.read()]
    assert {"0/cpu", "1/cpu"} <= set(names)
    assert len(names) == len(set(names))
    second_host_has_a_meter = False
    assert meters.read() == (), "a part is not the whole"
    assert HostMeters(Layout(rank=1, world=3, local_rank=1, local_world=2))._own.read() == ()


def test_a_gpu_that_cannot_be_read_leaves_no_joules(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda index: 4 + index)
    meters = HostMeters(Layout(device=torch.device("cuda", 0)))
    assert meters.read() == (), "the processor's joules would look like all of them"
    assert "the GPUs that train cannot all be read" in meters.name


@dataclass(frozen=True)
class Item:
    number: int
    length: int


@pytest.mark.parametrize("most_tokens", [None, 1, 10, 21, 1000])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_is_dealt_without_overlap(processes, most_tokens):
    batch = [Item(n, n % 7 + 1) for n in range(3, 26)]
    rounds = deal(batch, processes, most_tokens)
    assert {len(each) for each in rounds} == {processes}
    parts = [part for each in rounds for part in each]
    assert sorted((item for part in parts for item in part), key=lambda item: item.number) == batch
    sizes = [len(part) * max(item.length for item in part) for part in parts if part]
    assert most_tokens is None or max(sizes) <= max(most_tokens, 7)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if most_tokens is None:
        assert len(rounds) == 1


def test_fewer_samples_than_processes_leave_some_without():
    one, other = Item(5, 1), Item(3, 1)
    assert deal([one, other], 3, None) == [[[one], [other], []]]
