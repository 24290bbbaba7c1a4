"""What training feels is what the graphs compute, and nothing stays behind."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from models.graph import quantize, quantize_rows, write_graphs
from models.weights import _joined
from tests.tiny import tiny_config, tiny_transformer, weights_of
from tests.training import recipes
from training.export import torch_logits
from training.fake_quantise import FakeQuantised, fake_blocks, fake_rows
from training.graphs import Graphs
from training.recipe import Storage
from training.together import Together
from training.train import train

WEIGHTS = arrays.arrays(np.float32, (3, 32), elements=st.floats(-4, 4, width=32, allow_subnormal=False))
WAYS = [
    Storage(scheme="rowwise"),
    Storage(scheme="rowwise", bits=7),
    Storage(scheme="blockwise", bits=8, block_size=32),
    Storage(scheme="blockwise", bits=4, block_size=16),
]
SMALL_TABLES = Storage(scheme="rowwise", table_bits=4)


@given(WEIGHTS, st.sampled_from([7, 8]))
def test_rows_are_what_their_codes_stand_for(weight, bits):
    codes, scales = quantize_rows(weight, bits)
    assert np.allclose(fake_rows(torch.from_numpy(weight), bits).numpy(), codes * scales[:, None], atol=1e-6)
    assert np.abs(codes).max() <= {7: 63, 8: 127}[bits]


@given(WEIGHTS, st.sampled_from([4, 8]))
def test_blocks_are_what_their_codes_stand_for(weight, bits):
    codes, scales = quantize(weight, bits, 16)
    wanted = _joined(codes, scales, bits)
    assert np.allclose(fake_blocks(torch.from_numpy(weight), bits, 16).numpy(), wanted, atol=1e-6)


def test_gradients_pass_as_if_nothing_were_rounded():
    weight = torch.linspace(-1, 1, 64).view(2, 32).requires_grad_()
    for stored in (fake_rows(weight), fake_blocks(weight, 4, 16)):
        (gradient,) = torch.autograd.grad((stored * torch.arange(32.0)).sum(), weight)
        assert torch.equal(gradient, torch.arange(32.0).expand(2, 32))


@pytest.mark.parametrize(
    ("kind", "how"),
    [*product(["classify", "bert-span", "decoder", "encoder-decoder"], WAYS), ("bert-span", SMALL_TABLES)],
    ids=lambda each: each if isinstance(each, str) else f"{each.scheme}{each.bits}-{each.table_bits}",
)
def test_a_model_computes_as_its_quantised_graph(tmp_path, kind, how):
    config = tiny_config(kind)
    model = tiny_transformer(config)
    ids = torch.tensor([[7, 9, 11, 30], [8, 90, 12, 0]])
    batch = {"ids": ids, "lengths": torch.tensor([4, 3]), "target": ids[:, :3], "target_lengths": torch.tensor([3, 2])}
    write_graphs(tmp_path, config, weights_of(model), how.scheme, how.bits, how.block_size, table_bits=how.table_bits)
    exact, graph = torch_logits(model, batch), Graphs(tmp_path, config).logits(batch)
    with FakeQuantised(model, how):
        found = torch_logits(model, batch)
    assert np.abs(found - graph).max() < 0.3 * np.abs(exact - graph).max()
    assert np.array_equal(torch_logits(model, batch), exact)


def test_another_model_stays_exact():
    model, teacher = (tiny_transformer(tiny_config("classify")) for _ in range(2))
    x = torch.linspace(-1, 1, 64).view(2, 32)
    exact = teacher.encoder[0].ffn.up(x)
    with FakeQuantised(model, WAYS[0]):
        assert torch.equal(teacher.encoder[0].ffn.up(x), exact)
        assert not torch.equal(model.encoder[0].ffn.up(x), exact)


def test_heads_of_every_task_stay_exact():
    together = Together(tiny_config("bert-classify"), [tiny_config("bert-span")])
    x = torch.linspace(-1, 1, 64).view(2, 32)
    for member in together.members:
        exact = member.head.out(x)
        with FakeQuantised(together, WAYS[0]):
            assert torch.equal(member.head.out(x), exact)


def test_mixed_precision_leaves_codes_as_they_are():
    model = tiny_transformer(tiny_config("classify"))
    x = torch.linspace(-1, 1, 64).view(2, 32)
    with FakeQuantised(model, WAYS[0]):
        exact = model.encoder[0].ffn.up(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.encoder[0].ffn.up(x), exact)


def test_only_the_last_steps_of_a_run_are_quantised(data, tmp_path, monkeypatch):
    entered = []

    class Counted(FakeQuantised):
        def __enter__(self):
            entered.append(self.how)
            return super().__enter__()

    monkeypatch.setattr("training.train.FakeQuantised", Counted)
    fit = {**recipes.FIT, "batch_tokens": 40, "epochs": 2, "quantise_last": 0.25}
    recipe = recipes.translate(fit=fit)
    trained = train(recipe, data, tmp_path)
    assert len(entered) == round(0.25 * trained.progress.step) > 0
    assert all(how == recipe.export for how in entered)
    for scheme in ("none", "float16"):
        with pytest.raises(ValueError, match=f"export.scheme is '{scheme}', so there are no codes to train for"):
            recipes.translate(fit=fit, export={**recipe.export.model_dump(), "scheme": scheme})
