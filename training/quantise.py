"""One stage: an exported model in, the same model with its matrices stored in another way out. Knows nothing of
training: what was quantised before is quantised once more, from what its codes stand for."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from models.graph import write_graphs
from models.manifest import Manifest, load_manifest, write_manifest
from models.weights import read_weights
from training.card import write_card
from training.export import onnx_logits, parity_batch, write_quantised
from training.recipe import ExportRecipe, Recipe


def quantise(folder: Path, recipe: Recipe, data: Path, schemes: Sequence[ExportRecipe], out: Path) -> list[Manifest]:
    """Write the model in ``folder`` as each of ``schemes`` says, into folders of ``out`` that are numbered from 0.

    The manifests say how far each is from the model's own weights in float32, on samples of the recipe's data; scores
    are left out, as nobody has measured them. Raises ``ArtefactError`` for a folder that is no model.
    """
    manifest = load_manifest(folder)
    weights = read_weights(folder, manifest.quantisation)
    batch = parity_batch(recipe, Tokenizer.from_file(str(folder / "tokenizer.json")), data)
    with tempfile.TemporaryDirectory() as scratch:
        write_graphs(Path(scratch), manifest.config, weights, "none")
        reference = onnx_logits(Path(scratch), manifest.config, batch)
    written = []
    for number, how in enumerate(schemes):
        target = out / str(number)
        target.mkdir(parents=True)
        shutil.copy(folder / "tokenizer.json", target)
        stored = write_quantised(target, manifest.config, weights, how, batch, reference)
        changed = manifest.model_copy(update={"quantisation": stored, "scores": ()})
        write_card(target, changed)
        written.append(write_manifest(target, changed))
    return written
