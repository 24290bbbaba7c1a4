import pytest

from models.config import TransformerConfig
from models.transformer import Transformer
from training.budget import count_parameters, right_size, stored_bytes
from training.errors import TrainingError

COMMON = {"vocab_size": 50, "d_model": 32, "n_heads": 2, "d_ff": 48, "max_positions": 20}
BERT = {"style": "bert", "n_token_types": 2, **COMMON}
MODERN = {"style": "modern", **COMMON}
SHAPES = [
    TransformerConfig(architecture="encoder", head="classify", n_labels=3, n_encoder_layers=2, **BERT),
    TransformerConfig(architecture="encoder", head="span", n_encoder_layers=1, **MODERN),
    TransformerConfig(architecture="decoder", head="lm", n_decoder_layers=3, **MODERN),
    TransformerConfig(architecture="encoder-decoder", head="lm", n_encoder_layers=2, n_decoder_layers=1, **MODERN),
    TransformerConfig(architecture="prefix-lm", head="lm", n_decoder_layers=2, extract_head=True, **BERT),
]


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.architecture}-{config.style}")
def test_counts_what_the_model_has(config):
    assert count_parameters(config) == Transformer(config).n_parameters


@pytest.mark.parametrize("config", SHAPES, ids=lambda config: f"{config.architecture}-{config.style}")
@pytest.mark.parametrize("factor", [0.7, 1.0, 3.0])
def test_is_the_largest_within_the_budget(config, factor):
    budget = round(factor * count_parameters(config))
    sized = right_size(config, budget)
    assert count_parameters(sized) <= budget
    if factor >= 1:
        assert count_parameters(sized) >= count_parameters(config)
    assert sized.head_dim == config.head_dim
    assert Transformer(sized).n_parameters == count_parameters(sized)


def test_a_budget_of_bytes_counts_the_scales():
    config = SHAPES[2]
    n = count_parameters(config)
    assert stored_bytes(config, 32, 64) == 4 * n
    assert stored_bytes(config, 8, 64) == round(n * (1 + 4 / 64))
    whole = right_size(config, 4 * n, lambda each: stored_bytes(each, 32, 64))
    quantised = right_size(config, 4 * n, lambda each: stored_bytes(each, 4, 64))
    assert count_parameters(whole) == n
    assert count_parameters(quantised) > n
    assert stored_bytes(quantised, 4, 64) <= 4 * n


def test_says_what_the_smallest_costs():
    with pytest.raises(TrainingError, match="smallest takes"):
        right_size(SHAPES[2], 10)
