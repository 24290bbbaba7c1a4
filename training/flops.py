"""How much a Transformer computes, from its shape alone. Knows nothing of weights or machines."""

from dataclasses import dataclass

from models.config import TransformerConfig

BACKWARD = 2.0
"""Going back costs twice what going forward does: gradients of inputs and of weights (Kaplan et al. 2020, 2.1)."""


@dataclass(frozen=True)
class TextSize:
    """Tokens of one text, or their mean over many."""

    read: float
    """By the encoder, or by a decoder that has none before it."""
    written: float = 0.0
    """By the decoder after an encoder."""
    words: float = 0.0
    """Positions that the output layer chooses a word at."""


def forward_flops(config: TransformerConfig, size: TextSize) -> float:
    """Floating point operations of one text's pass through the matrices and the attention.

    Two for each weight and token, and ``4 d_model`` for each pair of positions and layer: the scores and the mixture
    (Kaplan et al. 2020, table 1, without its saving on the masked half, which is computed here). Norms, activations
    and looking up embeddings are left out.
    """
    d = config.d_model
    token = 2 * (4 * d * d + 2 * d * config.d_ff)

    def layer(tokens: float) -> float:
        return tokens * token + 4 * d * tokens * tokens

    total = config.n_encoder_layers * layer(size.read)
    if config.has_encoder and config.has_decoder:
        cross = 4 * d * d * (size.read + size.written) + 4 * d * size.read * size.written
        total += config.n_decoder_layers * (layer(size.written) + cross)
    else:
        total += config.n_decoder_layers * layer(size.read)
    if config.head == "lm":
        total += size.words * 2 * d * (config.vocab_size + (d if config.style == "bert" else 0))
    elif config.head == "span":
        total += size.read * 4 * d
    elif config.head == "classify":
        total += 2 * d * config.n_labels
    return total


def training_flops(config: TransformerConfig, size: TextSize) -> float:
    """The same for a step of training on one text."""
    return (1 + BACKWARD) * forward_flops(config, size)
