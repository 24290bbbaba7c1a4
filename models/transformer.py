"""The Transformer, whole: encoder, decoder, encoder-decoder and prefix LM from the same parts.

Knows nothing of tokenizers, tasks or training; token ids in, hidden states and logits out. Shapes in comments:
``b`` batch, ``h`` heads, ``s`` query positions, ``t`` key positions, ``d`` model width, ``e`` head size.
Padding is on the right, so a row is described by its length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.config import TransformerConfig

_SHORT = 64
"""Up to this many keys the plain formula trains faster than the fused kernel (20 keys, bfloat16, CPU: 9 against 53 ms
forward and back for 150 rows of 4 heads of 64; at 256 keys it is slower)."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None, *, return_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``softmax(Q K^T / sqrt(d_k)) V`` (Vaswani et al. 2017, equation 1).

    ``query`` is ``(b, h, s, e)``, ``key`` and ``value`` ``(b, h, t, e)``; ``visible`` is a bool tensor that
    broadcasts to ``(b, h, s, t)``, True where a query may see a key. A query that sees no key gets zeros.
    Returns the mixed values ``(b, h, s, e)`` and, on request, the weights ``(b, h, s, t)``.
    """
    if not return_weights and key.size(2) > _SHORT:
        # The same formula in torch's fused kernel, which never holds the (s, t) matrix in memory.
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible), None
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if visible is not None:
        # softmax over nothing but -inf is NaN; such a query attends to nothing.
        weights = weights.masked_fill(~visible, 0.0)
    return weights @ value, weights if return_weights else None


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """``(b, 1, 1, size)``, True at the real tokens of right-padded rows."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None])[:, None, None, :]


def causal_mask(size: int, prefix_lengths: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """``(1 or b, 1, size, size)``, True where key position <= query position or within the row's prefix.

    Right padding needs no mask of its own: no real query sees a later position.
    """
    position = torch.arange(size, device=device)
    visible = (position <= position[:, None])[None, None]
    if prefix_lengths is not None:
        visible = visible | length_mask(prefix_lengths, size)
    return visible


def rotary_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(max_positions, e / 2)`` of rotary position embeddings (Su et al. 2021)."""
    half = config.head_dim // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.max_positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of ``x`` ``(b, h, s, e)`` by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[: x.size(2)].to(x.dtype), sin[: x.size(2)].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, over its last axis."""
        # Under autocast a bfloat16 input meets the float32 weight, which torch's fused kernel refuses.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention (``memory`` None) or cross-attention over ``memory``."""

    def __init__(self, config: TransformerConfig, *, cross: bool = False) -> None:
        super().__init__()
        width, bias = config.d_model, config.style == "bert"
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        if cross:
            self.q = nn.Linear(width, width, bias=bias)
            self.kv = nn.Linear(width, 2 * width, bias=bias)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.style == "modern":
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_heads, self.head_dim).transpose(1, 2)  # (b, s, d) -> (b, h, s, e)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """``x`` ``(b, s, d)`` -> ``(b, s, d)``; ``memory`` is ``(b, t, d)``."""
        if memory is None:
            q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q = self._heads(self.q(x))
            k, v = (self._heads(part) for part in self.kv(memory).chunk(2, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed, _ = attention(q, k, v, visible)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Position-wise network: GELU in the bert style, squared ReLU (So et al. 2021) in the modern."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        bias = config.style == "bert"
        self.gelu = config.style == "bert"
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, s, d)`` -> ``(b, s, d)``."""
        x = self.up(x)
        return self.down(F.gelu(x) if self.gelu else F.relu(x).square())  # type: ignore[no-any-return]


def _norm(config: TransformerConfig) -> nn.Module:
    if config.style == "modern":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps)


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory, feed-forward; each with a residual and a norm."""

    def __init__(self, config: TransformerConfig, *, cross: bool = False) -> None:
        super().__init__()
        self.post_norm = config.style == "bert"
        self.recompute = False
        """Whether training keeps only the layer's input, and computes the rest again for the gradients."""
        self.attn, self.attn_norm = Attention(config), _norm(config)
        if cross:
            self.cross, self.cross_norm = Attention(config, cross=True), _norm(config)
        self.ffn, self.ffn_norm = FeedForward(config), _norm(config)

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        memory: Tensor | None = None,
        memory_visible: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """``x`` ``(b, s, d)`` -> ``(b, s, d)``."""
        inputs = (x, visible, rotary, memory, memory_visible, dropout)
        if self.recompute and self.training:
            return checkpoint(self._compute, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return self._compute(*inputs)

    def _compute(
        self,
        x: Tensor,
        visible: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        memory: Tensor | None,
        memory_visible: Tensor | None,
        dropout: float,
    ) -> Tensor:
        if self.post_norm:
            x = self.attn_norm(x + F.dropout(self.attn(x, visible, rotary), dropout, self.training))
            x = self.ffn_norm(x + F.dropout(self.ffn(x), dropout, self.training))
            return x
        x = x + F.dropout(self.attn(self.attn_norm(x), visible, rotary), dropout, self.training)
        if memory is not None:
            # No rotation across: positions of source and target are not comparable.
            mixed = self.cross(self.cross_norm(x), memory_visible, None, memory)
            x = x + F.dropout(mixed, dropout, self.training)
        return x + F.dropout(self.ffn(self.ffn_norm(x)), dropout, self.training)


class Embedding(nn.Module):
    """Token embeddings, with the positions, types and norm of the bert style or the sqrt(d) scale of the modern."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.bert = config.style == "bert"
        self.scale = math.sqrt(config.d_model)
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        if self.bert:
            self.position = nn.Embedding(config.max_positions, config.d_model)
            self.token_type = nn.Embedding(config.n_token_types, config.d_model)
            self.norm = _norm(config)

    def forward(self, ids: Tensor, token_types: Tensor | None = None) -> Tensor:
        """``ids`` ``(b, s)`` -> ``(b, s, d)``; absent token types are all zero."""
        x = self.token(ids)
        if not self.bert:
            return x * self.scale  # type: ignore[no-any-return]
        types = self.token_type.weight[0] if token_types is None else self.token_type(token_types)
        x = x + self.position.weight[: ids.size(1)] + types
        return self.norm(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """The output layer: labels from the mean over real tokens, start and end scores, or words (tied embedding)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.kind = config.head
        if config.head == "classify":
            self.out = nn.Linear(config.d_model, config.n_labels)
        elif config.head == "span":
            self.out = nn.Linear(config.d_model, 2)
        elif config.style == "bert":
            # BERT's transform before the tied output; the modern style projects its final norm directly.
            self.dense = nn.Linear(config.d_model, config.d_model)
            self.norm = _norm(config)
        if config.extract_head:
            self.extract = nn.Linear(config.d_model, 1)


class Transformer(nn.Module):
    """Token ids in, logits out; see ``models.config.TransformerConfig`` for the shapes it takes."""

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(self, config: TransformerConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        cross = config.architecture == "encoder-decoder"
        self.embed = Embedding(config)
        self.encoder = nn.ModuleList(Layer(config) for _ in range(config.n_encoder_layers))
        self.decoder = nn.ModuleList(Layer(config, cross=cross) for _ in range(config.n_decoder_layers))
        if config.style == "modern":
            if config.has_encoder:
                self.encoder_norm = _norm(config)
            if config.has_decoder:
                self.decoder_norm = _norm(config)
            cos, sin = rotary_tables(config)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.head = Head(config)
        self.apply(_initialise)
        if config.style == "modern":
            for name, weight in self.named_parameters():
                # Each branch starts as zero, so that the network starts as the identity (Zhang et al. 2019).
                if name.endswith(("attn.out.weight", "cross.out.weight", "ffn.down.weight")):
                    nn.init.zeros_(weight)

    @property
    def n_parameters(self) -> int:
        """Trainable numbers, the tied output counted once."""
        return sum(weight.numel() for weight in self.parameters())

    def _rotary(self) -> tuple[Tensor, Tensor] | None:
        return (self.rotary_cos, self.rotary_sin) if self.config.style == "modern" else None

    def encode(self, ids: Tensor, lengths: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Read right-padded ``ids`` ``(b, s)`` in both directions -> ``(b, s, d)``."""
        x = self._encoder_layers(ids, lengths, token_types)[-1]
        return self.encoder_norm(x) if self.config.style == "modern" else x

    def vectors(self, ids: Tensor, lengths: Tensor, token_types: Tensor | None = None) -> Tensor:
        """What stands for each whole text: the means over real tokens of the ``vector_layers`` side by side,
        ``(b, len(vector_layers) * d)``."""
        layers = self._encoder_layers(ids, lengths, token_types)
        return torch.cat([_mean(layers[number - 1], lengths) for number in self.config.vector_layers], dim=-1)

    def _encoder_layers(self, ids: Tensor, lengths: Tensor, token_types: Tensor | None) -> list[Tensor]:
        """What each layer puts out, ``(b, s, d)``."""
        x = F.dropout(self.embed(ids, token_types), self.dropout, self.training)
        visible = length_mask(lengths, ids.size(1))
        layers = []
        for layer in self.encoder:
            x = layer(x, visible, self._rotary(), dropout=self.dropout)
            layers.append(x)
        return layers

    def decode(
        self,
        ids: Tensor,
        *,
        prefix_lengths: Tensor | None = None,
        token_types: Tensor | None = None,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
    ) -> Tensor:
        """Read ``ids`` ``(b, s)`` left to right -> ``(b, s, d)``.

        A prefix LM gives ``prefix_lengths`` ``(b,)``, an encoder-decoder ``memory`` ``(b, t, d)`` and its lengths.
        """
        x = F.dropout(self.embed(ids, token_types), self.dropout, self.training)
        visible = causal_mask(ids.size(1), prefix_lengths, ids.device)
        memory_visible = None
        if memory is not None and memory_lengths is not None:
            memory_visible = length_mask(memory_lengths, memory.size(1))
        for layer in self.decoder:
            x = layer(x, visible, self._rotary(), memory, memory_visible, dropout=self.dropout)
        return self.decoder_norm(x) if self.config.style == "modern" else x

    def label_logits(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Classify the mean of the real tokens of ``hidden`` ``(b, s, d)`` -> ``(b, n_labels)``."""
        return self.head.out(_mean(hidden, lengths))  # type: ignore[no-any-return]

    def span_logits(self, hidden: Tensor) -> Tensor:
        """Start and end score of each token: ``(b, s, d)`` -> ``(b, s, 2)``."""
        return self.head.out(hidden)  # type: ignore[no-any-return]

    def word_logits(self, hidden: Tensor) -> Tensor:
        """``(..., d)`` -> ``(..., vocab_size)`` through the tied embedding."""
        if self.config.style == "bert":
            hidden = self.head.norm(F.gelu(self.head.dense(hidden)))
        return F.linear(hidden, self.embed.token.weight)

    def extract_logits(self, hidden: Tensor) -> Tensor:
        """Score of each token as the start of a sentence to extract: ``(b, s, d)`` -> ``(b, s)``."""
        return self.head.extract(hidden).squeeze(-1)  # type: ignore[no-any-return]


def _mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """``(b, s, d)`` -> ``(b, d)``, over the real tokens."""
    real = length_mask(lengths, hidden.size(1))[:, 0, 0, :, None]
    return (hidden * real).sum(1) / lengths[:, None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
