"""Other people's models: what their checkpoints call each weight, and which of them the graphs can express.

Loads with the transformers library, whose forward pass is the reference; knows nothing of files that we write.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import PretrainedConfig, PreTrainedModel

from models.config import Activation, Pooling, TransformerConfig
from training.errors import TrainingError
from training.tasks import Batch

Names = Mapping[str, tuple[str, ...]]
"""Our module's name -> the modules whose rows, one below the other, are its own."""

_BERT_LAYER: Names = {
    "attn.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn.out": ("attention.output.dense",),
    "attn_norm": ("attention.output.LayerNorm",),
    "ffn.up": ("intermediate.dense",),
    "ffn.down": ("output.dense",),
    "ffn_norm": ("output.LayerNorm",),
}
_DISTILBERT_LAYER: Names = {
    "attn.qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attn.out": ("attention.out_lin",),
    "attn_norm": ("sa_layer_norm",),
    "ffn.up": ("ffn.lin1",),
    "ffn.down": ("ffn.lin2",),
    "ffn_norm": ("output_layer_norm",),
}
_LLAMA_LAYER: Names = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "attn_norm": ("input_layernorm",),
    "ffn.up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
    "ffn_norm": ("post_attention_layernorm",),
}
_MARIAN_ENCODER_LAYER: Names = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.out_proj",),
    "attn_norm": ("self_attn_layer_norm",),
    "ffn.up": ("fc1",),
    "ffn.down": ("fc2",),
    "ffn_norm": ("final_layer_norm",),
}
_MARIAN_DECODER_LAYER: Names = {
    **_MARIAN_ENCODER_LAYER,
    "cross.q": ("encoder_attn.q_proj",),
    "cross.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross.out": ("encoder_attn.out_proj",),
    "cross_norm": ("encoder_attn_layer_norm",),
}
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu", "silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Foreign:
    """A model of the transformers library, told in our terms."""

    theirs: PreTrainedModel
    config: TransformerConfig
    weights: Mapping[str, NDArray[np.float32]]

    @torch.no_grad()
    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """What the graphs compute on ``batch``, by the library; see ``training.graphs``."""
        lengths = batch["lengths"]
        real = torch.arange(batch["ids"].size(1)) < lengths[:, None]
        inputs = {"input_ids": batch["ids"], "attention_mask": real.long()}
        rows = torch.arange(len(lengths))
        if self.config.n_token_types:
            inputs["token_type_ids"] = batch["types"]
        if self.config.architecture == "encoder-decoder":
            logits = self.theirs(**inputs, decoder_input_ids=batch["target"]).logits
            return logits[rows, batch["target_lengths"] - 1].numpy()  # type: ignore[no-any-return]
        output = self.theirs(**inputs)
        match self.config.head:
            case "lm":
                found = output.logits[rows, lengths - 1]
            case "classify":
                found = output.logits
            case "span":
                found = torch.stack((output.start_logits, output.end_logits), -1)[real]
            case "embed":
                hidden = output.last_hidden_state
                mean = (hidden * real[..., None]).sum(1) / lengths[:, None]
                found = hidden[:, 0] if self.config.pooling == "first" else mean
        return found.numpy()  # type: ignore[no-any-return]

    @torch.no_grad()
    def written(self, ids: torch.Tensor, most: int) -> torch.Tensor:
        """What an encoder-decoder writes of ``ids`` (1, s) greedily, its start included, (1, ``most`` at most)."""
        mask = torch.ones_like(ids)
        found: torch.Tensor = self.theirs.generate(  # type: ignore[operator]
            ids, attention_mask=mask, num_beams=1, do_sample=False, max_length=None, max_new_tokens=most
        )
        return found[:, :most]


def load_foreign(folder: Path, max_positions: int, pooling: Pooling) -> Foreign:
    """Load the model in ``folder`` for texts of up to ``max_positions`` tokens.

    ``pooling`` is that of an encoder without a head. Raises ``TrainingError``, naming the field of ``config.json``,
    for what the graphs cannot express, and for weights that are missing or do not fit.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{folder}: config.json cannot be read: {error}") from error
    name, *_ = config.architectures or ["nothing"]
    if name not in _FAMILIES:
        raise TrainingError(f"config.json: architectures names {name}; importable are {', '.join(sorted(_FAMILIES))}")
    shape = _FAMILIES[name]
    # Bert's pooler is read by its classifier alone.
    extra = {"add_pooling_layer": False} if name == "BertModel" else {}
    try:
        # In float32 whatever the checkpoint has, and by the plain formula.
        theirs, loaded = getattr(transformers, name).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **extra
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{folder}: the weights cannot be loaded: {error}") from error
    if loaded["missing_keys"]:
        raise TrainingError(f"{folder}: the weights lack {', '.join(sorted(loaded['missing_keys']))}")
    theirs.eval()
    found = _Weights(theirs)
    mapped = shape(config, found, min(max_positions, config.max_position_embeddings))
    if mapped.head == "embed":
        mapped = mapped.model_copy(update={"pooling": pooling})
    return Foreign(theirs, mapped, found.ours)


class _Weights:
    """Their modules, and ours as they are put together."""

    def __init__(self, theirs: PreTrainedModel) -> None:
        self.theirs, self._state = theirs, theirs.state_dict()
        self.ours: dict[str, NDArray[np.float32]] = {}

    @property
    def stem(self) -> str:
        """What the names of the base model's modules begin with, below a head."""
        base = self.theirs.base_model
        return "" if base is self.theirs else f"{self.theirs.base_model_prefix}."

    def put(self, ours: str, *theirs: str) -> None:
        """Weights, and biases where they have them, of the modules ``theirs`` as one."""
        for kind in ("weight", "bias"):
            parts = [self._state[f"{name}.{kind}"] for name in theirs if f"{name}.{kind}" in self._state]
            if parts:
                self.ours[f"{ours}.{kind}"] = torch.cat(parts).numpy()

    def put_layers(self, ours: str, theirs: str, count: int, names: Names) -> None:
        """``count`` layers of one stack."""
        for number in range(count):
            for name, parts in names.items():
                self.put(f"{ours}.{number}.{name}", *(f"{theirs}.{number}.{part}" for part in parts))

    def put_rows(self, ours: str, theirs: str, count: int) -> None:
        """The first ``count`` rows of a table of positions."""
        self.ours[f"{ours}.weight"] = self._state[f"{theirs}.weight"][:count].numpy()


def _expect(config: PretrainedConfig, field: str, *able: object) -> Any:
    """The value of a field that must be one of ``able``; a field that is not there is as good as the first of them."""
    value = getattr(config, field, able[0])
    if value not in able:
        known = " or ".join(map(repr, able))
        raise TrainingError(f"config.json: {field} is {value!r}; the graphs can express {known}")
    return value


def _llama(config: PretrainedConfig, weights: _Weights, max_positions: int) -> TransformerConfig:
    heads = config.num_attention_heads
    _expect(config, "hidden_act", "silu")
    _expect(config, "head_dim", config.hidden_size // heads)
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise TrainingError(
            f"config.json: rope_scaling or rope_parameters is {rope}; the graphs rotate without scaling"
        )
    # A window that no text outgrows is none.
    if (window := getattr(config, "sliding_window", None)) is not None and window < max_positions:
        raise TrainingError(
            f"config.json: sliding_window is {window}, and the graphs attend to all of a text: "
            f"import it with --max-positions {window}"
        )
    weights.put("embed.token", "model.embed_tokens")
    weights.put_layers("decoder", "model.layers", config.num_hidden_layers, _LLAMA_LAYER)
    weights.put("decoder_norm", "model.norm")
    if not config.tie_word_embeddings:
        weights.put("head.out", "lm_head")
    return TransformerConfig(
        architecture="decoder",
        style="llama",
        head="lm",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_heads=heads,
        n_kv_heads=config.num_key_value_heads,
        d_ff=config.intermediate_size,
        n_decoder_layers=config.num_hidden_layers,
        max_positions=max_positions,
        norm_eps=config.rms_norm_eps,
        rope_base=rope["rope_theta"],
    )


def _marian(config: PretrainedConfig, weights: _Weights, max_positions: int) -> TransformerConfig:
    _expect(config, "share_encoder_decoder_embeddings", True)
    _expect(config, "scale_embedding", True)
    _expect(config, "decoder_vocab_size", config.vocab_size)
    _expect(config, "decoder_attention_heads", config.encoder_attention_heads)
    _expect(config, "decoder_ffn_dim", config.encoder_ffn_dim)
    activation = _ACTIVATIONS[_expect(config, "activation_function", *_ACTIVATIONS)]
    weights.put("embed.token", "model.shared")
    weights.put_rows("embed.position", "model.encoder.embed_positions", max_positions)
    word_bias = _word_bias(weights.theirs)
    if word_bias.any():
        weights.ours["head.out.bias"] = word_bias
    weights.put_layers("encoder", "model.encoder.layers", config.encoder_layers, _MARIAN_ENCODER_LAYER)
    weights.put_layers("decoder", "model.decoder.layers", config.decoder_layers, _MARIAN_DECODER_LAYER)
    if not config.tie_word_embeddings:
        weights.put("head.out", "lm_head")
    return TransformerConfig(
        architecture="encoder-decoder",
        style="marian",
        head="lm",
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        n_heads=config.encoder_attention_heads,
        d_ff=config.encoder_ffn_dim,
        n_encoder_layers=config.encoder_layers,
        n_decoder_layers=config.decoder_layers,
        max_positions=max_positions,
        activation=activation,
        norm_eps=1e-5,
    )


def _word_bias(marian: PreTrainedModel) -> NDArray[np.float32]:
    """What is added to the score of each word: minus infinity for those that must never be written."""
    bias = marian.state_dict()["final_logits_bias"][0]
    generation = marian.generation_config
    for word in (generation and generation.bad_words_ids) or ():
        if len(word) != 1:
            raise TrainingError(
                f"generation_config.json: bad_words_ids holds {word}; the graphs rule out single words"
            )
        bias[word] = -torch.inf  # in place: the reference rules them out as well
    return bias.numpy()  # type: ignore[no-any-return]


def _bert(config: PretrainedConfig, weights: _Weights, max_positions: int) -> TransformerConfig:
    _expect(config, "hidden_act", "gelu")
    _expect(config, "position_embedding_type", "absolute")
    _expect(config, "is_decoder", False)
    stem = weights.stem
    weights.put("embed.token_type", f"{stem}embeddings.token_type_embeddings")
    weights.put_layers("encoder", f"{stem}encoder.layer", config.num_hidden_layers, _BERT_LAYER)
    weights.put("head.dense", f"{stem}pooler.dense")
    sizes = {"d_ff": config.intermediate_size, "n_token_types": config.type_vocab_size}
    return _encoder(config, weights, max_positions, "first-tanh", norm_eps=config.layer_norm_eps, **sizes)


def _distilbert(config: PretrainedConfig, weights: _Weights, max_positions: int) -> TransformerConfig:
    _expect(config, "activation", "gelu")
    weights.put_layers("encoder", f"{weights.stem}transformer.layer", config.num_hidden_layers, _DISTILBERT_LAYER)
    weights.put("head.dense", "pre_classifier")
    return _encoder(config, weights, max_positions, "first-relu", norm_eps=1e-12, d_ff=config.hidden_dim)


def _encoder(
    config: PretrainedConfig, weights: _Weights, max_positions: int, pooling: Pooling, **sizes: Any
) -> TransformerConfig:
    """What BERT and DistilBERT call alike, and the head; ``pooling`` is that of a classifier."""
    weights.put("embed.token", f"{weights.stem}embeddings.word_embeddings")
    weights.put_rows("embed.position", f"{weights.stem}embeddings.position_embeddings", max_positions)
    weights.put("embed.norm", f"{weights.stem}embeddings.LayerNorm")
    weights.put("head.out", "classifier", "qa_outputs")
    kind = type(weights.theirs).__name__
    head: dict[str, Any] = {"head": "embed"}
    if kind.endswith("ForSequenceClassification"):
        _expect(config, "problem_type", None, "single_label_classification")
        head = {"head": "classify", "n_labels": config.num_labels, "pooling": pooling}
    elif kind.endswith("ForQuestionAnswering"):
        head = {"head": "span"}
    return TransformerConfig(
        architecture="encoder",
        style="bert",
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_encoder_layers=config.num_hidden_layers,
        max_positions=max_positions,
        **head,
        **sizes,
    )


_FAMILIES: dict[str, Callable[[PretrainedConfig, _Weights, int], TransformerConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _llama,
    "Qwen2ForCausalLM": _llama,
    "MarianMTModel": _marian,
    **{f"Bert{head}": _bert for head in ("Model", "ForSequenceClassification", "ForQuestionAnswering")},
    **{f"DistilBert{head}": _distilbert for head in ("Model", "ForSequenceClassification", "ForQuestionAnswering")},
}
"""By the class that wrote the checkpoint; Mistral is a Llama here, and Qwen2 one with a bias."""
