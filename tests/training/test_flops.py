"""What a shape computes, against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.transformer import Transformer
from tests.training.test_budget import SHAPES
from training.flops import TextSize, forward_flops, training_flops

READ, WRITTEN = 9, 6


def computed(config):
    """One text through a real model, and its size."""
    model = Transformer(config).eval()
    ids, lengths = torch.ones((1, READ), dtype=torch.long), torch.tensor([READ])
    types = torch.zeros_like(ids) if config.n_token_types else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if config.architecture == "encoder-decoder":
            memory = model.encode(ids, lengths)
            hidden = model.decode(ids[:, :WRITTEN], memory=memory, memory_lengths=lengths)
            model.word_logits(hidden[0])
            return counter.get_total_flops(), TextSize(READ, WRITTEN, WRITTEN)
        if config.has_decoder:
            prefix = torch.tensor([3]) if config.architecture == "prefix-lm" else None
            model.word_logits(model.decode(ids, prefix_lengths=prefix, token_types=types)[0, :WRITTEN])
            return counter.get_total_flops(), TextSize(READ, words=WRITTEN)
        hidden = model.encode(ids, lengths, types)
        model.span_logits(hidden) if config.head == "span" else model.label_logits(hidden, lengths)
        return counter.get_total_flops(), TextSize(READ)


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.architecture}-{config.style}")
def test_counts_what_torch_counts(config):
    counted, size = computed(config)
    assert forward_flops(config, size) == counted
    assert training_flops(config, size) == 3 * counted
