"""A model that another begins with or learns from: a run, or the folder of an exported model, as PyTorch weights.

Knows nothing of tasks or of what is learned from it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from models.config import TransformerConfig
from models.manifest import MANIFEST_NAME, ArtefactError, Manifest, Parent, Stage, load_manifest
from models.transformer import Transformer
from models.weights import read_weights
from training.errors import TrainingError
from training.recipe import InitRecipe, Recipe, load_recipe

RECIPE = "recipe.json"
"""In a run's folder: what the run carries out."""
_SAME = ("style", "d_model", "n_heads")
"""What a student must share with the parent whose layers it takes."""


@dataclass(frozen=True)
class ParentModel:
    """A finished model, in float32 and not training."""

    name: str
    licence: str
    labels: tuple[str, ...]
    model: Transformer
    tokenizer: Tokenizer
    lineage: tuple[Stage, ...]
    """The stages that led to it."""
    parent: Parent | None = None
    """What it came from itself."""

    @property
    def note(self) -> str:
        """What the cards of those that come from it say of where it came from."""
        if self.parent is None:
            return ""
        before = self.parent
        return f"{self.name} was {before.relation} from {before.name} ({before.licence}). {before.note}".rstrip()


def find_folder(source: str) -> Path | None:
    """The folder of the exported model ``source``; None where it is none, and so a run's name."""
    return Path(source) if (Path(source) / MANIFEST_NAME).is_file() else None


def load_parent(source: str, runs: Path) -> ParentModel:
    """The exported model in the folder ``source``, else the run of that name. Raises ``TrainingError``."""
    folder = find_folder(source)
    return _from_run(source, runs) if folder is None else _from_folder(folder)


def read_model_manifest(folder: Path) -> Manifest:
    """The manifest of a model folder, whose files are as it says. Raises ``TrainingError``."""
    try:
        return load_manifest(folder)
    except ArtefactError as error:
        raise TrainingError(f"{folder}: {error}") from error


def _from_folder(folder: Path) -> ParentModel:
    manifest = read_model_manifest(folder)
    if manifest.layout != "wattle" or manifest.config.style not in ("modern", "bert"):
        raise TrainingError(f"{folder}: an imported model; only what was trained here can be trained further")
    model = Transformer(manifest.config)
    weights = {
        name: torch.from_numpy(np.array(array)) for name, array in read_weights(folder, manifest.quantisation).items()
    }
    model.load_state_dict(weights)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = _whole(model, tokenizer, folder)
    return ParentModel(
        manifest.name, manifest.licence, manifest.labels, model, tokenizer, manifest.lineage, manifest.parent
    )


def _from_run(name: str, runs: Path) -> ParentModel:
    from training.train import load_trained  # which itself begins with a parent

    recipe = run_recipe(name, runs)
    trained = load_trained(recipe, runs)
    model = _whole(trained.model.float(), trained.tokenizer, runs / name)
    return ParentModel(name, recipe.licence, recipe.labels, model, trained.tokenizer, trained.lineage, trained.parent)


def run_recipe(name: str, runs: Path) -> Recipe:
    """What the run ``name`` carried out. Raises ``TrainingError`` where there is no such run."""
    path = runs / name / RECIPE
    try:
        return Recipe.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (runs / name).is_dir():
            return load_recipe(name)  # it began before runs kept their recipes
        raise TrainingError(f"{name}: neither a run in {runs} nor the folder of an exported model") from None
    except ValueError as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error


def _whole(model: Transformer, tokenizer: Tokenizer, where: Path) -> Transformer:
    words, known = model.config.vocab_size, tokenizer.get_vocab_size()
    if words != known:
        raise TrainingError(f"{where}: its weights have {words:,} words, its tokenizer {known:,}: they do not match")
    return model.eval()


def begin_with(
    model: Transformer, parent: ParentModel, init: InitRecipe, labels: tuple[str, ...], kept: NDArray[np.int64]
) -> None:
    """Copy into ``model`` what it can have of ``parent``: embeddings (the rows ``kept``), layers, norms, head.

    The layers are those that ``init`` names, or the first ones. A stack that the parent lacks takes the layers of the
    one that it has; cross-attention and a head that it lacks stay fresh. A narrower feed-forward keeps the hidden
    units that weigh most. Raises ``TrainingError`` where the shapes cannot fit.
    """
    student, config = model.state_dict(), parent.model.config
    for name in _SAME:
        theirs, ours = getattr(config, name), getattr(model.config, name)
        if theirs != ours:
            raise TrainingError(f"model.{name}: {parent.name} has {theirs}, the recipe {ours}; they must be the same")
    source = _source(model.config, parent, init)
    source["embed.token.weight"] = source["embed.token.weight"][torch.from_numpy(kept)]
    if not _same_head(model.config, parent, labels):
        source = {name: weight for name, weight in source.items() if not name.startswith("head.")}
        if model.config.head == "lm" and model.config.style == "bert":
            source["head.dense.weight"] = torch.eye(config.d_model)
    taken: dict[str, Tensor] = {}
    for name, wanted in student.items():
        if name not in source:
            continue
        weight = source[name]
        if name in ("embed.position.weight", "embed.token_type.weight"):
            weight = weight[: len(wanted)]
        if weight.shape != wanted.shape:
            raise TrainingError(
                f"{name}: {parent.name} has {tuple(weight.shape)}, the recipe's model {tuple(wanted.shape)}"
            )
        taken[name] = weight
    model.load_state_dict(taken, strict=False)


def _source(config: TransformerConfig, parent: ParentModel, init: InitRecipe) -> dict[str, Tensor]:
    """The parent's weights under the names that they have in the student."""
    theirs = parent.model.state_dict()
    stacks = [stack for stack in ("encoder", "decoder") if getattr(parent.model.config, f"n_{stack}_layers")]
    source = {name: weight for name, weight in theirs.items() if name.startswith(("embed.", "head."))}
    for stack in ("encoder", "decoder"):
        depth = getattr(config, f"n_{stack}_layers")
        if not depth:
            continue
        origin = stack if stack in stacks else stacks[0]
        there = getattr(parent.model.config, f"n_{origin}_layers")
        chosen = init.layers_of(stack) or tuple(range(min(depth, there)))
        if len(chosen) != depth or max(chosen) >= there:
            raise TrainingError(
                f"init.layers: the {stack} has {depth} layers and takes {list(chosen)} of {parent.name}'s {there}; "
                "name as many as it has, counted from 0"
            )
        if f"{origin}_norm.weight" in theirs:
            source[f"{stack}_norm.weight"] = theirs[f"{origin}_norm.weight"]
        for new, old in enumerate(chosen):
            prefix = f"{origin}.{old}."
            layer = {name[len(prefix) :]: weight for name, weight in theirs.items() if name.startswith(prefix)}
            source |= {f"{stack}.{new}.{name}": weight for name, weight in _narrowed(layer, config.d_ff).items()}
    return source


def _narrowed(layer: dict[str, Tensor], d_ff: int) -> dict[str, Tensor]:
    """A layer with the ``d_ff`` hidden units whose weights in and out are the largest, in their order."""
    up, down = layer["ffn.up.weight"], layer["ffn.down.weight"]
    if d_ff >= len(up):
        return layer
    units = (up.norm(dim=1) * down.norm(dim=0)).topk(d_ff).indices.sort().values
    narrow = {"ffn.up.weight": up[units], "ffn.down.weight": down[:, units]}
    if "ffn.up.bias" in layer:
        narrow["ffn.up.bias"] = layer["ffn.up.bias"][units]
    return {**layer, **narrow}


def _same_head(config: TransformerConfig, parent: ParentModel, labels: tuple[str, ...]) -> bool:
    """Whether the parent's head does the student's work; labels in another order are other work."""
    return parent.model.config.head == config.head and (config.head != "classify" or parent.labels == labels)
