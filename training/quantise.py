"""One stage: an exported model in, what it is like with its matrices stored in other ways out. Knows nothing of
training or HTTP: what was quantised before is quantised once more, from what its codes stand for."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tokenizers import Tokenizer

from models.graph import write_graphs
from models.manifest import Manifest, Variant, load_manifest, write_manifest
from models.weights import read_weights
from training.card import write_card
from training.evaluate import Evaluation
from training.export import onnx_logits, parity_batch, write_quantised
from training.knowledge import Ask
from training.recipe import Recipe, Storage

Serve = Callable[[Path], AbstractContextManager[Ask]]
"""Serves the model in a folder for a while."""

WAYS = (
    Storage(scheme="none"),
    Storage(scheme="rowwise"),
    Storage(scheme="blockwise", bits=8, block_size=64),
    Storage(scheme="blockwise", bits=4, block_size=32),
)


def variants(
    folder: Path, recipe: Recipe, data: Path, serve: Serve, score: Callable[[Ask, Manifest, Path], list[Evaluation]]
) -> Iterator[Variant]:
    """Store the model in ``folder`` in each of ``WAYS`` and have it scored, served.

    All start from the same weights, those that its own codes stand for. Raises ``ArtefactError`` for a folder that is
    no model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for number, how in enumerate(WAYS):
            out = Path(scratch) / str(number)
            manifest = quantise(folder, recipe, data, how, out)
            stored = manifest.quantisation
            with serve(out) as ask:
                found = score(ask, manifest, out)
            shutil.rmtree(out)
            queries, joules = sum(each.queries for each in found), [each.joules for each in found if each.queries]
            known = None if not queries or None in joules else sum(each for each in joules if each is not None)
            yield Variant(
                scheme=stored.scheme,
                bits=stored.bits,
                size_mb=round(manifest.size_bytes / 1e6, 1),
                parity_cosine=stored.parity_cosine or 1.0,
                scores=tuple(one for each in found for one in each.scores),
                active_j_per_query=None if known is None else round(known / queries, 5),
                quality=found[0].quality if found else "unavailable",
            )


def quantise(folder: Path, recipe: Recipe, data: Path, how: Storage, out: Path) -> Manifest:
    """Write the model in ``folder`` into ``out``, stored as ``how`` says.

    Its manifest says how far it is from the same weights in float32, on samples of the recipe's data; scores are left
    out, as nobody has measured them.
    """
    manifest = load_manifest(folder)
    config = manifest.config
    weights = read_weights(folder, manifest.quantisation)
    batch = parity_batch(recipe, Tokenizer.from_file(str(folder / "tokenizer.json")), data)
    with tempfile.TemporaryDirectory() as scratch:
        write_graphs(Path(scratch), config, weights, "none")
        reference = onnx_logits(Path(scratch), config, batch)
    out.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.json", out)
    stored = write_quantised(out, config, weights, how, batch, reference)
    changed = manifest.model_copy(update={"quantisation": stored, "scores": ()})
    write_card(out, changed)
    return write_manifest(out, changed)
