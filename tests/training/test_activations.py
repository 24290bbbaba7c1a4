"""Which scales of activations can be fixed, and that little is lost."""

import numpy as np
import pytest
import torch

from models.graph import write_graphs
from tests.tiny import KINDS, tiny_config, tiny_transformer, weights_of
from training.activations import fixed_peak, fixed_peaks
from training.graphs import Graphs


def batches(config, count=12):
    """Texts of random words, one each, as training would read them."""
    torch.manual_seed(1)
    for number in range(count):
        length = 3 + number
        ids = torch.randint(6, config.vocab_size, (1, length))
        lengths = torch.tensor([length])
        batch = {"ids": ids, "lengths": lengths, "prefix": torch.tensor([2]), "types": torch.zeros_like(ids)}
        yield {**batch, "target": ids.flip(1), "target_lengths": lengths}


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_fixed_and_the_logits_stay(tmp_path, kind):
    config = tiny_config(kind)
    weights = weights_of(tiny_transformer(config))
    peaks = fixed_peaks(config, weights, batches(config))
    side = "encoder" if config.architecture == "encoder" else "decoder"
    assert f"{side}.0.attn.qkv.weight" in peaks
    assert all(name in weights and peak > 0 for name, peak in peaks.items())
    found = {}
    for scheme in ("none", "rowwise", "calibrated"):
        folder = tmp_path / scheme
        folder.mkdir()
        write_graphs(folder, config, weights, scheme, peaks=peaks)
        graphs = Graphs(folder, config)
        found[scheme] = np.concatenate([graphs.logits(batch) for batch in batches(config)])
    error = {scheme: np.sqrt(np.mean((each - found["none"]) ** 2)) for scheme, each in found.items()}
    assert 0 < error["calibrated"] <= 4 * error["rowwise"]


@pytest.mark.parametrize(
    ("peaks", "fixed"),
    [
        ([1.0, 1.2, 2.4, 0.9, 1.1], 1.1 * 2.4),
        # One token sticks out: with its scale the others would have few codes left.
        ([1.0, 1.2, 2.9, 0.9, 1.1], None),
        ([0.0, 0.0], None),
    ],
)
def test_a_scale_is_fixed_where_no_row_sticks_out(peaks, fixed):
    assert fixed_peak(np.array(peaks)) == (None if fixed is None else pytest.approx(fixed))
