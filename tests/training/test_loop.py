import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
import torch
from torch import nn

from training.checkpoint import CHECKPOINT, load_checkpoint
from training.distributed import Execution, join
from training.errors import TrainingError
from training.loop import Work, fit_model, precision_on
from training.optimisers import Muon, learning_rate_factor, make_optimisers, orthogonalised
from training.recipe import FitRecipe
from training.records import Progress, read_log

ROOT = Path(__file__).parent.parent.parent

FIT = FitRecipe(epochs=3, batch_tokens=8, learning_rate=0.05, dropout=0.1, precision="float32", checkpoint_every_s=0)
DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Small, and with dropout: a resumed run must draw what an unbroken one draws."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.dropout = dropout
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(nn.functional.dropout(torch.tanh(self.hidden(x)), self.dropout, self.training))


def batches(epoch):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[start : start + 4] for start in range(0, 12, 4)]


@dataclass
class Token:
    """A sample of one token."""

    number: int
    length: int = 1


class Squares:
    """The mean square of what the net gets wrong, with an accident at one step."""

    def __init__(self, accident_at=None, accident=None):
        self.accidents = accident_at if isinstance(accident_at, range) else [accident_at]
        self.accident, self.step = accident, 0

    def count(self, batch):
        return [len(batch["x"])]

    def loss(self, net, batch):
        total = (net(batch["x"])[:, 0] - batch["x"].sum(1)).square().sum()
        if self.step in self.accidents:
            total = self.accident(total)
        self.step += 1
        return [total]


def interrupt(total):
    raise KeyboardInterrupt


def run(folder, fit=FIT, accident_at=None, accident=None, same=None, dropout=0.5, **execution):
    torch.manual_seed(0)
    net = Net(dropout)
    work = Work(
        Squares(accident_at, accident),
        batches,
        lambda batch: [Token(number) for number in batch],
        lambda samples: {"x": DATA[[sample.number for sample in samples]]},
        lambda sample: f"number {sample.number}",
    )
    folder.mkdir(exist_ok=True)
    return net, fit_model(net, fit, work, folder, Execution(**execution), same)


@pytest.mark.parametrize(
    ("able", "found"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True, "avx512_bf16": False}, "float32")]
)
def test_precision_is_what_the_processor_multiplies(monkeypatch, able, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert precision_on(torch.device("cpu"), "auto") == found
    assert precision_on(torch.device("cpu"), "float16") == "float16"


@pytest.mark.parametrize("interrupt_at", [1, 3, 5, 8])
@pytest.mark.parametrize(
    "changes", [{"optimiser": "adamw"}, {"optimiser": "muon"}, {"precision": "bfloat16"}, {"precision": "float16"}]
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path, changes, interrupt_at):
    fit = FIT.model_copy(update=changes)
    unbroken, progress = run(tmp_path / "unbroken", fit)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", fit, interrupt_at, interrupt)
    resumed, again = run(tmp_path / "broken", fit)
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    states = [
        [each["state"] for each in torch.load(tmp_path / name / CHECKPOINT, weights_only=True)["optimisers"]]
        for name in ("unbroken", "broken")
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (
        (again.step, again.tokens, again.loss)
        == (progress.step, progress.tokens, progress.loss)
        == (9, 36, again.loss)
    )


LONG = FIT.model_copy(update={"epochs": 20, "log_every_s": 0})
SLOW = """
import sys, time
from pathlib import Path
from tests.training.test_loop import LONG, run
run(Path(sys.argv[1]), LONG, accident_at=range(1, 1000), accident=lambda total: (time.sleep(0.02), total)[1])
"""


def test_a_kill_at_any_moment_loses_at_most_the_last_interval(tmp_path):
    """A checkpoint is written at every step, so a step is the interval."""
    broken = tmp_path / "broken"
    with Popen([sys.executable, "-c", SLOW, str(broken)], cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL) as process:
        while not (broken / CHECKPOINT).exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))  # any moment will do
        process.kill()
    _, kept = load_checkpoint(broken, Net())
    assert kept.step <= read_log(broken)[-1]["step"] <= kept.step + 1
    unbroken, progress = run(tmp_path / "unbroken", LONG)
    resumed, again = run(broken, LONG)
    assert (again.step, again.tokens, again.loss) == (progress.step, progress.tokens, progress.loss)
    assert [line["step"] for line in read_log(broken)] == list(range(1, 61))
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_training_lowers_the_loss_and_counts_its_energy(tmp_path):
    fit = FIT.model_copy(update={"epochs": 60, "checkpoint_every_s": 1000.0})
    _, first = run(tmp_path / "short", FIT)
    _, progress = run(tmp_path / "long", fit)
    assert progress.loss < 0.7 * first.loss
    assert [line["step"] for line in read_log(tmp_path / "short")] == [1, 9]
    assert progress.elapsed_s > 0
    assert progress.joules > first.joules > 0
    assert progress.quality != "unavailable"


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan .* at step 4, on 4 samples such as number 11; .*lower"):
        run(tmp_path / "run", accident_at=4, accident=lambda total: total * math.nan)
    steps, progress = load_checkpoint(tmp_path / "run", Net())
    assert (steps, progress.step) == (9, 4)
    with pytest.raises(TrainingError, match=r"at step 0, .*No checkpoint is lost: mend the data"):
        run(tmp_path / "other", accident_at=0, accident=lambda total: total * math.nan)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(TrainingError, match="not a checkpoint of this model"):
        load_checkpoint(tmp_path / "run", nn.Linear(2, 2))
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(TrainingError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "run", Net())


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(tmp_path / "run")
    state = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    state["progress"]["device"] = "a GPU elsewhere"
    torch.save(state, tmp_path / "run" / CHECKPOINT)
    _, progress = run(tmp_path / "run", accident_at=0, accident=interrupt)
    assert (progress.step, progress.device) == (9, "a GPU elsewhere")


def test_gradients_that_are_no_numbers_stop_too(tmp_path):
    # The root of zero is a number, its slope is none: saved weights must not have followed it.
    with pytest.raises(TrainingError, match=r"norm of its gradients nan at step 4"):
        run(tmp_path / "run", accident_at=4, accident=lambda total: total + (total * 0).sqrt())
    net = Net()
    load_checkpoint(tmp_path / "run", net)
    assert all(weight.isfinite().all() for weight in net.parameters())


def test_float16_skips_a_step_whose_gradients_overflow(tmp_path):
    fit = FIT.model_copy(update={"precision": "float16"})
    run(tmp_path / "calm", fit)
    net, progress = run(tmp_path / "run", fit, accident_at=8, accident=lambda total: total + (total * 0).sqrt())
    assert progress.step == 9
    assert all(weight.isfinite().all() for weight in net.parameters())
    calm, skipped = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True)["scaler"] for name in ("calm", "run"))
    assert skipped["scale"] == calm["scale"] / 2


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_step_in_parts_is_the_same_step(tmp_path, most):
    whole, progress = run(tmp_path / "whole", dropout=0.0)
    parts, again = run(tmp_path / "parts", dropout=0.0, micro_batch_tokens=most)
    assert progress.tokens == again.tokens == 36
    assert again.loss == pytest.approx(progress.loss, rel=1e-5)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=1e-5)


def test_memory_that_is_out_names_the_size_to_try(tmp_path):
    def allocate(total):
        return total + torch.empty(2**55).sum()

    with pytest.raises(TrainingError, match=r"4 samples of 4 padded tokens: .* --micro-batch-tokens 2; .* the same"):
        run(tmp_path / "run", accident_at=4, accident=allocate)
    assert load_checkpoint(tmp_path / "run", Net())[1].step == 4
    with pytest.raises(TrainingError, match="one sample of 1 tokens: start again with --recompute"):
        run(tmp_path / "run", accident_at=0, accident=allocate, micro_batch_tokens=1)

    def on_a_gpu(total):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match="--micro-batch-tokens 1"):
        run(tmp_path / "run", accident_at=0, accident=on_a_gpu, micro_batch_tokens=2)


def test_a_full_disk_leaves_the_checkpoint_of_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", accident_at=3, accident=interrupt)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    # Whatever is written to it fails with "no space left on device".
    for name in ("run", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{CHECKPOINT}.partial").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"cannot be written: .*; there was none before: make room"):
        run(tmp_path / "other")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: cannot be written: .*No space left.*make room"):
        run(tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before
    assert run(tmp_path / "run")[1].step == 9


def test_a_checkpoint_of_other_files_is_refused(tmp_path):
    run(tmp_path / "run", same={"tokenizer.json": "a"})
    with pytest.raises(TrainingError, match=r"tokenizer\.json: not what .* was trained with"):
        run(tmp_path / "run", same={"tokenizer.json": "b"})


def test_a_checkpoint_of_today_s_predecessors_is_read(tmp_path):
    net, _ = run(tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    old = {name: state[name] for name in ("model", "optimisers", "steps", "progress")} | {"rng": torch.get_rng_state()}
    del old["progress"]["device"]
    torch.save(old, path)
    again, progress = run(tmp_path / "run", same={"tokenizer.json": "a"})
    assert (progress.step, progress.device) == (9, "cpu")
    assert torch.equal(net.out.weight, again.out.weight)


def test_what_this_machine_cannot_do_is_said(tmp_path):
    with pytest.raises(TrainingError, match="start them with torchrun"):
        run(tmp_path / "run", fsdp=True)
    with pytest.raises(TrainingError, match=r"quantise_last .* no fsdp, recompute or compile"):
        run(tmp_path / "run", FIT.model_copy(update={"quantise_last": 0.5}), recompute=True)
    with pytest.raises(TrainingError, match="compile is for GPUs"):
        run(tmp_path / "run", compile=True)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="torch finds no GPU"), join("cuda"):
            pass


def test_the_schedule_warms_up_stands_and_falls():
    fit = FIT.model_copy(update={"warmup": 0.1, "decay": 0.5})
    factors = [learning_rate_factor(step, 100, fit) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[75] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.02)


def test_vectors_and_embeddings_do_not_decay():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "layer": nn.Linear(4, 4)})
    (adamw,) = make_optimisers(model, FIT)
    decaying, rest = adamw.param_groups
    assert decaying["weight_decay"] == FIT.weight_decay
    assert [weight.shape for weight in decaying["params"]] == [(4, 4)]
    assert rest["weight_decay"] == 0
    assert {weight.shape for weight in rest["params"]} == {(3, 4), (4,)}


def test_muon_is_for_the_matrices_of_layers_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    fit = FIT.model_copy(update={"optimiser": "muon"})
    muon, adamw = make_optimisers(model, fit)
    assert muon.param_groups[0]["params"] == [model["encoder"].weight]
    rest, heads = adamw.param_groups
    assert (rest["weight_decay"], heads["weight_decay"]) == (0, FIT.weight_decay)
    assert heads["params"] == [model["head"].weight]
    assert len(rest["params"]) == 3


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_muon_does_what_torch_does_in_bfloat16(shape):
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(shape, generator=generator), torch.randn((4, *shape), generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    whole = nn.Parameter(start.clone())
    optimisers = [
        Muon([ours], 0.1, 0.02, half=True),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        Muon([whole], 0.1, 0.02),
    ]
    for gradient in gradients:
        for weight, optimiser in zip((ours, theirs, whole), optimisers, strict=True):
            weight.grad = gradient.clone()
            optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole, theirs, rtol=0, atol=2e-2)
    assert not torch.equal(whole, ours)


def test_orthogonalised_singular_values_are_about_one():
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    stretched = left @ torch.diag(torch.logspace(-1, 1, 16)) @ right
    values = torch.linalg.svdvals(orthogonalised(stretched))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_progress_starts_unknown():
    assert math.isnan(Progress().loss)
    assert Progress().quality == "unavailable"
