"""A configuration that cannot be built is refused before any weight exists."""

import pytest
from pydantic import ValidationError

from models.config import TransformerConfig

BASE: dict[str, object] = {"vocab_size": 100, "d_model": 32, "n_heads": 4, "d_ff": 64, "max_positions": 16}
ENCODER = BASE | {"architecture": "encoder", "style": "bert", "head": "span", "n_encoder_layers": 2}
DECODER = BASE | {"architecture": "decoder", "style": "modern", "head": "lm", "n_decoder_layers": 2}
PREFIX_LM = DECODER | {"architecture": "prefix-lm", "style": "bert"}
LLAMA = DECODER | {"style": "llama", "n_kv_heads": 2}
MARIAN = DECODER | {
    "style": "marian", "architecture": "encoder-decoder", "n_encoder_layers": 2, "activation": "silu"
}  # fmt: skip
TRANSLATOR = DECODER | {"architecture": "encoder-decoder", "n_encoder_layers": 3}


@pytest.mark.parametrize(
    ("fields", "has_encoder", "has_decoder"),
    [
        (ENCODER, True, False),
        (ENCODER | {"head": "classify", "n_labels": 3}, True, False),
        (DECODER, False, True),
        (PREFIX_LM, False, True),
        (PREFIX_LM | {"extract_head": True}, False, True),
        (TRANSLATOR, True, True),
        (LLAMA, False, True),
        (MARIAN, True, True),
        (ENCODER | {"head": "embed", "pooling": "first"}, True, False),
    ],
)
def test_each_architecture_says_which_stacks_it_has(
    fields: dict[str, object], has_encoder: bool, has_decoder: bool
) -> None:
    config = TransformerConfig.model_validate(fields)
    assert (config.has_encoder, config.has_decoder) == (has_encoder, has_decoder)
    assert config.head_dim == 8
    assert TransformerConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (ENCODER | {"n_heads": 5}, "d_model 32 is not a multiple of n_heads 5"),
        (DECODER | {"n_heads": 32}, "an even head size, not 1"),
        (ENCODER | {"n_encoder_layers": 0}, "encoder with 0 encoder and 0 decoder layers"),
        (ENCODER | {"n_decoder_layers": 1}, "encoder with 2 encoder and 1 decoder layers"),
        (DECODER | {"n_encoder_layers": 1}, "decoder with 1 encoder and 2 decoder layers"),
        (PREFIX_LM | {"n_encoder_layers": 1}, "prefix-lm with 1 encoder and 2 decoder layers"),
        (TRANSLATOR | {"n_encoder_layers": 0}, "encoder-decoder with 0 encoder and 2 decoder layers"),
        (TRANSLATOR | {"style": "bert"}, "the bert style has no encoder-decoder"),
        (DECODER | {"head": "span"}, "head 'span' does not fit architecture 'decoder'"),
        (ENCODER | {"head": "classify"}, "n_labels goes with the classify head"),
        (ENCODER | {"n_labels": 3}, "n_labels goes with the classify head"),
        (DECODER | {"extract_head": True}, "extract_head goes with a prefix LM"),
        (DECODER | {"n_kv_heads": 2}, "the modern style has keys and values for every head"),
        (LLAMA | {"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        (LLAMA | {"n_heads": 32, "n_kv_heads": 32}, "an even head size, not 1"),
        (TRANSLATOR | {"style": "llama"}, "the llama style is for decoder models"),
        (DECODER | {"style": "marian", "activation": "relu"}, "the marian style is for encoder-decoder models"),
        (MARIAN | {"activation": None}, "activation goes with the marian style"),
        (DECODER | {"activation": "relu"}, "activation goes with the marian style"),
        (ENCODER | {"pooling": "first"}, "pooling goes with a classify or embed head"),
        (DECODER | {"head": "embed"}, "head 'embed' does not fit architecture 'decoder'"),
        (DECODER | {"style": "gothic"}, "style"),
        (DECODER | {"n_layers": 2}, "n_layers"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransformerConfig.model_validate(fields)


def test_groups_of_query_heads_share_keys_and_values() -> None:
    assert TransformerConfig.model_validate(LLAMA).kv_width == 16
    assert TransformerConfig.model_validate(DECODER).kv_width == 32


def test_a_configuration_does_not_change() -> None:
    config = TransformerConfig.model_validate(DECODER)
    with pytest.raises(ValidationError, match="frozen"):
        config.vocab_size = 1  # type: ignore[misc]
