"""The Transformer against independent references: float64 NumPy, torch's own attention and Hugging Face's BERT."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import BertConfig, BertModel

from models.transformer import Transformer, attention, causal_mask, length_mask, rotary_tables, rotate
from tests.tiny import KINDS, WRITERS, Kind, tiny_config, tiny_transformer

LENGTHS = torch.tensor([4, 9, 1])


def numpy_attention(
    q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64], visible: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Equation 1 of Vaswani et al. (2017), one query at a time."""
    mixed = np.zeros_like(q)
    visible = np.broadcast_to(visible, (*q.shape[:3], k.shape[2]))
    for b, h, s in np.ndindex(*q.shape[:3]):
        keys = visible[b, h, s]
        if keys.any():
            weights = np.exp(k[b, h, keys] @ q[b, h, s] / np.sqrt(q.shape[-1]))
            mixed[b, h, s] = weights / weights.sum() @ v[b, h, keys]
    return mixed


MASKS = {
    "everything": torch.ones(1, 1, 9, 9, dtype=torch.bool),
    "padding": length_mask(LENGTHS, 9),
    "causal": causal_mask(9),
    "prefix": causal_mask(9, LENGTHS),
    "rows that see nothing": length_mask(torch.tensor([4, 0, 9]), 9) & (torch.arange(9) != 3)[None, None, :, None],
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_equals_float64_numpy_and_torch(mask: str) -> None:
    visible = MASKS[mask]
    q, k, v = torch.randn(3, 3, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    fused, absent = attention(q, k, v, visible)
    plain, weights = attention(q, k, v, visible, return_weights=True)
    expected = numpy_attention(q.double().numpy(), k.double().numpy(), v.double().numpy(), visible.numpy())
    assert absent is None and weights is not None
    np.testing.assert_allclose(fused.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(plain.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(fused, F.scaled_dot_product_attention(q, k, v, attn_mask=visible))
    sees = visible.any(-1).expand(weights.shape[:3])
    torch.testing.assert_close(weights.sum(-1), sees.float())
    assert not weights[~visible.expand_as(weights)].any()
    assert not plain[~sees].any()


def test_attention_without_a_mask_sees_everything() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(5, 5, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v)[0], attention(q, k, v, everything)[0])
    weights = attention(q, k, v, return_weights=True)[1]
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))


def test_masks_are_what_their_names_say() -> None:
    assert length_mask(torch.tensor([0, 2]), 3).tolist() == [[[[False] * 3]], [[[True, True, False]]]]
    assert causal_mask(3)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(3, torch.tensor([2]))[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]


def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_alone() -> None:
    config = tiny_config("decoder")
    tables = rotary_tables(config)
    q, k = torch.randn(2, config.head_dim, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (rotate(x.expand(1, 1, 20, -1), *tables)[0, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(20))
    torch.testing.assert_close(turned_q[0], q)
    scores = turned_q @ turned_k.T
    for distance in (-7, 0, 5):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[0].expand_as(along), atol=1e-4, rtol=1e-4)


def test_the_bert_style_encoder_equals_hugging_face() -> None:
    config = tiny_config("bert-span")
    model = tiny_transformer(config)
    bert = BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_encoder_layers,
            num_attention_heads=config.n_heads,
            intermediate_size=config.d_ff,
            max_position_embeddings=config.max_positions,
            type_vocab_size=config.n_token_types,
            layer_norm_eps=config.norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()
    names = {
        "embed.token": "embeddings.word_embeddings",
        "embed.position": "embeddings.position_embeddings",
        "embed.token_type": "embeddings.token_type_embeddings",
        "embed.norm": "embeddings.LayerNorm",
    }
    for i in range(config.n_encoder_layers):
        ours, theirs = f"encoder.{i}", f"encoder.layer.{i}"
        names |= {
            f"{ours}.attn.out": f"{theirs}.attention.output.dense",
            f"{ours}.attn_norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.ffn.up": f"{theirs}.intermediate.dense",
            f"{ours}.ffn.down": f"{theirs}.output.dense",
            f"{ours}.ffn_norm": f"{theirs}.output.LayerNorm",
        }
    weights = {}
    for name, weight in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module.endswith("attn.qkv"):
            layer = module.split(".")[1]
            for part, rows in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                weights[f"encoder.layer.{layer}.attention.self.{part}.{kind}"] = rows
        elif module in names:
            weights[f"{names[module]}.{kind}"] = weight
    bert.load_state_dict(weights)
    ids = torch.randint(6, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    types = torch.randint(0, 2, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = length_mask(LENGTHS, 9)[:, 0, 0]
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
        hidden = model.encode(ids, LENGTHS, types)
    torch.testing.assert_close(hidden[mask], expected[mask], atol=1e-5, rtol=1e-5)


def hidden_states(model: Transformer, ids: torch.Tensor, prefixes: torch.Tensor | None) -> torch.Tensor:
    memory = {}
    if model.config.architecture == "encoder-decoder":
        lengths = torch.full((len(ids),), 5)
        memory = {"memory": model.encode(ids[:, :5], lengths), "memory_lengths": lengths}
    return model.decode(ids, prefix_lengths=prefixes, **memory)


@pytest.mark.parametrize("kind", WRITERS)
@torch.no_grad()
def test_what_is_written_depends_only_on_what_stands_before(kind: Kind) -> None:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    ids = torch.randint(6, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 8] += torch.where(ids[:, 8] > 10, -1, 1)
    prefixes = torch.tensor([6, 3]) if config.architecture == "prefix-lm" else None
    before, after = (hidden_states(model, x, prefixes) for x in (ids, other))
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("kind", ["prefix-lm", "bert-prefix-lm"])
@torch.no_grad()
def test_a_prefix_is_read_in_both_directions(kind: Kind) -> None:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    ids = torch.randint(6, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 4] += torch.where(ids[:, 4] > 10, -1, 1)
    before, after = (model.decode(x, prefix_lengths=torch.tensor([6, 3])) for x in (ids, other))
    assert (before[0, :4] - after[0, :4]).abs().amax(-1).min() > 1e-3  # within the prefix: seen from the left
    torch.testing.assert_close(before[1, :4], after[1, :4])  # beyond it: not


@pytest.mark.parametrize("kind", ["classify", "span", "bert-span"])
@torch.no_grad()
def test_padding_changes_no_real_token(kind: Kind) -> None:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    ids = torch.randint(6, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    together = model.encode(ids, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model.encode(ids[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(together[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)
        if config.head == "classify":
            torch.testing.assert_close(
                model.label_logits(together, LENGTHS)[row],
                model.label_logits(alone, LENGTHS[row : row + 1])[0],
                atol=1e-5,
                rtol=1e-5,
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_reaches_every_weight(kind: Kind) -> None:
    config = tiny_config(kind)
    model = tiny_transformer(config)
    ids = torch.randint(6, config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    if config.has_decoder:
        prefixes = LENGTHS if config.architecture == "prefix-lm" else None
        types = torch.ones_like(ids) if config.n_token_types else None
        memory = model.encode(ids, LENGTHS) if config.has_encoder else None
        hidden = model.decode(ids, prefix_lengths=prefixes, token_types=types, memory=memory, memory_lengths=LENGTHS)
        loss = model.word_logits(hidden).square().mean()
        if config.extract_head:
            loss = loss + model.extract_logits(hidden).square().mean()
    else:
        hidden = model.encode(ids, LENGTHS)
        logits = model.label_logits(hidden, LENGTHS) if config.head == "classify" else model.span_logits(hidden)
        loss = logits.square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_layers_computed_again_give_the_same_gradients(kind: Kind) -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny_transformer(tiny_config(kind)).train()
        model.dropout = 0.2
        for layer in (*model.encoder, *model.decoder):
            layer.recompute = recompute
        torch.manual_seed(1)
        ids = torch.arange(18).view(2, 9)
        memory = model.encode(ids, LENGTHS[:2]) if model.config.has_encoder else None
        decoded = model.config.has_decoder
        hidden = model.decode(ids, memory=memory, memory_lengths=LENGTHS[:2]) if decoded else memory
        hidden.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name
