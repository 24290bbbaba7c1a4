import pytest

from models.config import TransformerConfig
from models.transformer import Transformer
from tests.training import recipes
from training.budget import count_parameters, right_size, sized
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
    found = right_size(config, budget)
    assert count_parameters(found) <= budget
    if factor >= 1:
        assert count_parameters(found) >= count_parameters(config)
    assert found.head_dim == config.head_dim
    assert Transformer(found).n_parameters == count_parameters(found)


def test_a_budget_of_bytes_counts_the_scales():
    counts = []
    for how, size in [({"scheme": "none"}, 4.0), ({"scheme": "blockwise"}, 1 + 4 / 64), ({"scheme": "rowwise"}, 1.0)]:
        export = recipes.translate().export.model_dump() | {"block_size": 64, **how}
        recipe = recipes.translate(export=export, budget={"max_mb": 2.0})
        counts.append(count_parameters(sized(recipe, vocab_size=50)))
        assert counts[-1] * size <= 2e6
    assert counts[0] < counts[1] <= counts[2]


def test_says_what_the_smallest_costs():
    with pytest.raises(TrainingError, match="the smallest has"):
        right_size(SHAPES[2], 10)
