"""The shape of a Transformer. Knows nothing of weights, tokens or tasks; needs only pydantic."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

Architecture = Literal["encoder", "decoder", "encoder-decoder", "prefix-lm"]
Style = Literal["modern", "bert", "llama", "marian"]
Head = Literal["classify", "span", "lm", "embed"]
Pooling = Literal["mean", "first", "first-tanh", "first-relu"]
Activation = Literal["relu", "gelu", "silu"]
_ONLY: dict[Style, Architecture] = {"llama": "decoder", "marian": "encoder-decoder"}
"""The one architecture of the styles that have no other."""


class TransformerConfig(BaseModel):
    """Dimensions and dialect of one Transformer; the same object describes it in PyTorch, ONNX and the manifest.

    ``style`` is ``modern`` (pre-RMSNorm, RoPE, QK-norm, squared ReLU, no biases), ``bert`` (post-LayerNorm,
    learned positions, token types, GELU, biases), or that of models which are only imported: ``llama`` (pre-RMSNorm,
    RoPE, gated SiLU, groups of query heads that share keys and values) and ``marian`` (post-LayerNorm, a table of
    positions, scaled embeddings, biases). A prefix LM is a stack of decoder layers in which the prefix is read in
    both directions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    style: Style
    head: Head
    vocab_size: int
    d_model: int
    n_heads: int
    n_kv_heads: int | None = None
    """Heads of keys and values, each shared by a group of query heads; None is one for every query head."""
    d_ff: int
    n_encoder_layers: int = 0
    n_decoder_layers: int = 0
    max_positions: int
    n_labels: int = 0
    """Outputs of a ``classify`` head."""
    pooling: Pooling = "mean"
    """What stands for a whole text before a ``classify`` or ``embed`` head: the mean of its real tokens, or its first
    token, as it is or through a dense layer and tanh or ReLU."""
    vector_layers: tuple[int, ...] = ()
    """Layers of an encoder, counted from 1, whose outputs, each averaged over a text's real tokens, make up the text's
    vector, side by side: what classifiers are made on. Empty is a model that gives none beside its logits."""
    n_token_types: int = 0
    extract_head: bool = False
    """Whether a prefix LM also scores each prefix token as the start of a sentence worth extracting."""
    activation: Activation | None = None
    """Of the marian style, which is met with each of them; every other style has its own."""
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def kv_width(self) -> int:
        """Width of the keys, or the values, of one token."""
        return self.kv_heads * self.head_dim

    @property
    def rotates(self) -> bool:
        """Whether positions turn queries and keys (RoPE), instead of being added to the embeddings."""
        return self.style in ("modern", "llama")

    @property
    def has_encoder(self) -> bool:
        """Whether a stack of bidirectional layers without a cache exists."""
        return self.n_encoder_layers > 0

    @property
    def has_decoder(self) -> bool:
        """Whether a stack of layers with key/value buffers exists."""
        return self.n_decoder_layers > 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}")
        if self.kv_heads != self.n_heads and self.style != "llama":
            raise ValueError(f"the {self.style} style has keys and values for every head")
        if self.rotates and self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head size, not {self.head_dim}")
        wants = {
            "encoder": (True, False),
            "decoder": (False, True),
            "prefix-lm": (False, True),
            "encoder-decoder": (True, True),
        }[self.architecture]
        if (self.has_encoder, self.has_decoder) != wants:
            raise ValueError(
                f"{self.architecture} with {self.n_encoder_layers} encoder and {self.n_decoder_layers} decoder layers"
            )
        if self.style == "bert" and self.architecture == "encoder-decoder":
            raise ValueError("the bert style has no encoder-decoder: it brings no cross-attention weights")
        if self.architecture != _ONLY.get(self.style, self.architecture):
            raise ValueError(f"the {self.style} style is for {_ONLY[self.style]} models")
        if (self.style == "marian") != (self.activation is not None):
            raise ValueError("activation goes with the marian style, and only with it")
        if self.pooling != "mean" and self.head not in ("classify", "embed"):
            raise ValueError("pooling goes with a classify or embed head")
        # An encoder has an lm head while it learns from masked text.
        if self.head != "lm" and self.architecture != "encoder":
            raise ValueError(f"head {self.head!r} does not fit architecture {self.architecture!r}")
        if (self.head == "classify") != (self.n_labels > 0):
            raise ValueError("n_labels goes with the classify head, and only with it")
        if not all(1 <= layer <= self.n_encoder_layers for layer in self.vector_layers):
            raise ValueError(f"vector_layers {self.vector_layers} are not all among {self.n_encoder_layers} layers")
        if self.vector_layers and self.head not in ("classify", "span"):
            raise ValueError("vector_layers goes with a classify or span head")
        if self.extract_head and self.architecture != "prefix-lm":
            raise ValueError("extract_head goes with a prefix LM")
        return self
