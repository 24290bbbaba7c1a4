"""A right-sized model from a budget of parameters or of bytes on disk. Knows nothing of data or training."""

from collections.abc import Iterator

from models.config import TransformerConfig
from training.errors import TrainingError
from training.recipe import Recipe

VOCABULARY_SHARES = (1.0, 0.5, 0.25)
"""Of a recipe's vocabulary: the next one where the embeddings would be more than half of the model."""


def count_parameters(config: TransformerConfig) -> int:
    """Trainable numbers of ``models.transformer.Transformer(config)``, without building it."""
    d, bert = config.d_model, config.style == "bert"

    def linear(rows: int, columns: int) -> int:
        return rows * columns + (rows if bert else 0)

    norm = 2 * d if bert else d
    head_norms = 0 if bert else 2 * config.head_dim
    attention = linear(3 * d, d) + linear(d, d) + head_norms
    ffn = linear(config.d_ff, d) + linear(d, config.d_ff)
    layer = attention + ffn + 2 * norm
    decoder_layer = layer + (attention + norm if config.architecture == "encoder-decoder" else 0)
    total = config.n_encoder_layers * layer + config.n_decoder_layers * decoder_layer + config.vocab_size * d
    if bert:
        total += (config.max_positions + config.n_token_types) * d + norm
    else:
        total += norm * (config.has_encoder + config.has_decoder)
    if config.head == "lm":
        total += linear(d, d) + norm if bert else 0
    else:
        outputs = config.n_labels if config.head == "classify" else 2
        total += outputs * (d + 1)
    return total + (d + 1 if config.extract_head else 0)


def sized(recipe: Recipe, vocab_size: int) -> TransformerConfig:
    """The recipe's model with ``vocab_size`` words, grown or shrunk to the recipe's budget where it has one."""
    config = recipe.model.model_copy(update={"vocab_size": vocab_size})
    if recipe.budget.max_parameters is not None:
        return right_size(config, recipe.budget.max_parameters)
    if recipe.budget.max_mb is not None:
        return right_size(config, round(recipe.budget.max_mb * 1e6 / recipe.export.bytes_per_parameter))
    return config


def right_size(proportions: TransformerConfig, max_parameters: int) -> TransformerConfig:
    """The largest model of ``proportions`` with no more than ``max_parameters``.

    Width, depth and heads change together: the size of a head, d_ff / d_model and encoder : decoder layers stay.
    Raises ``TrainingError`` where even the smallest such model has more, and says how many.
    """
    fitting = [config for config in _family(proportions) if count_parameters(config) <= max_parameters]
    if not fitting:
        smallest = min(map(count_parameters, _family(proportions)))
        raise TrainingError(
            f"no model of this kind has only {max_parameters:,} parameters; the smallest has {smallest:,}, most of "
            "them the vocabulary: raise the budget or lower tokenizer.vocab_size"
        )
    return max(fitting, key=count_parameters)


def fitting(base: Recipe, max_mb: float | None) -> list[TransformerConfig]:
    """Shapes in the recipe's proportions of at most ``max_mb``, the smallest first; the recipe's own without a limit.

    A model that starts from a trunk keeps the trunk's width: its depth changes. Raises ``TrainingError``.
    """
    if max_mb is None:
        return [base.model]
    most = max_mb * 1e6 / base.export.bytes_per_parameter
    found: list[TransformerConfig] = []
    for share in VOCABULARY_SHARES:
        shapes = _shapes(base, round(base.model.vocab_size * share))
        found = sorted((each for each in shapes if count_parameters(each) <= most), key=count_parameters) or found
        if found and found[-1].vocab_size * found[-1].d_model <= count_parameters(found[-1]) / 2:
            break
    if not found:
        smallest = min(map(count_parameters, _shapes(base, round(base.model.vocab_size * VOCABULARY_SHARES[-1]))))
        least_mb = smallest * base.export.bytes_per_parameter / 1e6
        raise TrainingError(f"no {base.task} model of {max_mb:g} MB: the smallest has {least_mb:.2f} MB (--max-mb)")
    return found


def _shapes(base: Recipe, vocab_size: int) -> list[TransformerConfig]:
    config = base.model.model_copy(update={"vocab_size": vocab_size})
    if base.trunk is None:
        return list(_family(config))
    stack = "n_encoder_layers" if config.has_encoder else "n_decoder_layers"
    return [
        config.model_copy(update={stack: depth, "vector_layers": _as_deep(config, depth)})
        for depth in range(1, getattr(config, stack) + 1)
    ]


def _as_deep(proportions: TransformerConfig, depth: int) -> tuple[int, ...]:
    """The layers that make a text's vector, as far up in an encoder of ``depth`` layers; of two that meet, one."""
    whole = proportions.n_encoder_layers
    return tuple(dict.fromkeys(max(1, round(layer * depth / whole)) for layer in proportions.vector_layers))


def _family(proportions: TransformerConfig) -> Iterator[TransformerConfig]:
    """The same model at every number of heads up to four times its own, as much deeper as it is wider."""
    for heads in range(1, 4 * proportions.n_heads + 1):
        scale = heads / proportions.n_heads

        def layers(count: int, scale: float = scale) -> int:
            return max(1, round(count * scale)) if count else 0

        width = heads * proportions.head_dim
        if width % 16:
            continue  # quantised blocks are cut from rows of at least 16
        yield proportions.model_copy(
            update={
                "n_heads": heads,
                "d_model": width,
                "d_ff": max(16, round(proportions.d_ff * scale / 16) * 16),
                "n_encoder_layers": layers(proportions.n_encoder_layers),
                "n_decoder_layers": layers(proportions.n_decoder_layers),
                "vector_layers": _as_deep(proportions, layers(proportions.n_encoder_layers)),
            }
        )
