import math

import pytest
import torch
from torch import nn

from training.errors import TrainingError
from training.loop import CHECKPOINT, Progress, fit_model, learning_rate_factor, load_checkpoint, make_optimisers
from training.recipe import FitRecipe

FIT = FitRecipe(epochs=3, batch_tokens=8, learning_rate=0.05, dropout=0.1, precision="float32", checkpoint_every_s=0)
DATA = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Small, and with dropout: a resumed run must draw what an unbroken one draws."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(nn.functional.dropout(torch.tanh(self.hidden(x)), 0.5, self.training))


def batches(epoch):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[start : start + 4] for start in range(0, 12, 4)]


def run(folder, fit=FIT, interrupt_at=None, spoil_at=None):
    torch.manual_seed(0)
    net = Net()
    steps = iter(range(10_000))

    def loss_of(batch):
        step = next(steps)
        if step == interrupt_at:
            raise KeyboardInterrupt
        x = DATA[batch]
        loss = (net(x)[:, 0] - x.sum(1)).square().mean()
        return (loss * math.nan if step == spoil_at else loss), len(batch)

    folder.mkdir(exist_ok=True)
    return net, fit_model(net, fit, batches, loss_of, folder)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("interrupt_at", [1, 3, 5, 8])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, optimiser, interrupt_at):
    fit = FIT.model_copy(update={"optimiser": optimiser})
    unbroken, progress = run(tmp_path / "unbroken", fit)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", fit, interrupt_at)
    resumed, again = run(tmp_path / "broken", fit)
    for name, weight in unbroken.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    assert (
        (again.step, again.tokens, again.loss)
        == (progress.step, progress.tokens, progress.loss)
        == (9, 36, again.loss)
    )


def test_training_lowers_the_loss_and_counts_its_energy(tmp_path):
    fit = FIT.model_copy(update={"epochs": 60, "checkpoint_every_s": 1000.0})
    _, first = run(tmp_path / "short", FIT)
    _, progress = run(tmp_path / "long", fit)
    assert progress.loss < 0.7 * first.loss
    assert progress.elapsed_s > 0
    assert progress.joules > first.joules > 0
    assert progress.quality != "unavailable"


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan at step 4.*lower the learning rate"):
        run(tmp_path / "run", spoil_at=4)
    steps, progress = load_checkpoint(tmp_path / "run", Net())
    assert (steps, progress.step) == (9, 4)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(TrainingError, match="not a checkpoint of this model"):
        load_checkpoint(tmp_path / "run", nn.Linear(2, 2))
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(TrainingError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "run", Net())


def test_a_finished_run_is_not_trained_again(tmp_path):
    run(tmp_path / "run")
    _, progress = run(tmp_path / "run", interrupt_at=0)
    assert progress.step == 9


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


def test_progress_starts_unknown():
    assert math.isnan(Progress().loss)
    assert Progress().quality == "unavailable"
