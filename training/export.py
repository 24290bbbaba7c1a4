"""One stage: a finished run in, a verified model folder out. Knows nothing of how the model was trained.

The graphs are first written in float32 and compared with PyTorch, then quantised and compared with float32.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from energy.requests import weakest
from energy.types import Quality
from models.config import TransformerConfig
from models.graph import write_graphs
from models.manifest import (
    Manifest,
    Quantisation,
    SpecialIds,
    Stage,
    TrainingData,
    TrainingEnergy,
    write_manifest,
)
from models.transformer import Transformer
from training.activations import fixed_peaks
from training.card import write_card
from training.errors import TrainingError, writing
from training.graphs import Graphs
from training.recipe import Recipe, Storage
from training.records import gco2e
from training.tasks import TASKS, Batch, Sample, collate
from training.tokenizer import BOS, EOS, PAD, PAD_ID, token_id
from training.train import Trained, load_rows

PARITY_LIMIT = 1e-4
"""Largest difference that the float32 graph may have to PyTorch, per logit."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message.role == 'user' else '<|assistant|>' }}{{ message.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Parity:
    """How far two models' logits are apart on the same batch."""

    max_error: float
    cosine: float


@dataclass(frozen=True)
class Finished:
    """A model that is ready to be written."""

    name: str
    config: TransformerConfig
    weights: Mapping[str, NDArray[np.float32]]
    """Named as ``models.graph`` wants them."""
    tokenizer: Tokenizer
    batch: Batch
    """What its graphs are tried on."""
    reference: NDArray[np.float32] | None
    """The logits that they should answer; None where nothing but the weights says."""
    texts: Iterable[Batch] = ()
    """What its activations are observed on, one text each; the calibrated scheme alone needs them."""
    tolerance: float = PARITY_LIMIT


def export(recipe: Recipe, trained: Trained, data: Path, out: Path) -> Manifest:
    """Write ``out/<name>`` from a finished run; see ``write_model``."""
    samples = real_samples(recipe, trained.tokenizer, data)
    batch = parity_batch(samples)
    finished = Finished(
        name=recipe.name,
        config=trained.model.config,
        weights={key: weight.float().numpy() for key, weight in trained.model.state_dict().items()},
        tokenizer=trained.tokenizer,
        batch=batch,
        reference=torch_logits(trained.model, batch),
        texts=one_by_one(samples),
    )
    return write_model(finished, recipe.export, partial(_manifest, recipe, trained, finished.config), out)


def write_model(model: Finished, how: Storage, describe: Callable[[Quantisation], Manifest], out: Path) -> Manifest:
    """Write ``out/<name>``: graphs, tokenizer, card, manifest. An existing folder is replaced once all is verified.

    ``describe`` makes the manifest. Raises ``TrainingError`` where the float32 graph differs from PyTorch by more than
    the model's tolerance.
    """
    config, name = model.config, model.name
    with writing(out / name):
        out.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that the last step is a rename; a server passes over names with a dot.
        with (
            tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as scratch,
            tqdm(total=2, desc=f"exporting {name}", unit="stage", delay=1.0) as bar,
        ):
            folder = Path(scratch) / name
            folder.mkdir()
            write_graphs(folder, config, model.weights, "none")
            logits = Graphs(folder, config).logits(model.batch)
            reference = logits if model.reference is None else model.reference
            found = compare(logits, reference)
            if not found.max_error <= model.tolerance:
                raise TrainingError(f"{name}: the float32 graph differs from PyTorch by {found.max_error:.2g}")
            bar.update()
            stored = write_quantised(folder, model, how, reference)
            (folder / "tokenizer.json").write_text(model.tokenizer.to_str(), encoding="utf-8")
            manifest = describe(stored)
            write_card(folder, manifest)
            manifest = write_manifest(folder, manifest)
            bar.update()
            if (out / name).exists():
                (out / name).rename(Path(scratch) / "replaced")
            folder.rename(out / name)
    return manifest


def random_batch(config: TransformerConfig, pad_id: int) -> Batch:
    """Ragged rows of random words: in every language the graphs must answer what their reference does."""
    generator = torch.Generator().manual_seed(0)

    def texts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
        real = torch.tensor([min(length, config.max_positions) for length in lengths])
        ids = torch.randint(config.vocab_size, (len(lengths), int(real.max())), generator=generator)
        ids[torch.arange(ids.size(1)) >= real[:, None]] = pad_id
        return ids, real

    ids, lengths = texts(7, 24, 1, 13)
    types = torch.randint(max(1, config.n_token_types), ids.shape, generator=generator)
    target, target_lengths = texts(9, 1, 12, 24)
    batch = {"ids": ids, "lengths": lengths, "types": types, "target": target, "target_lengths": target_lengths}
    return {**batch, "prefix": lengths}


def write_quantised(folder: Path, model: Finished, how: Storage, reference: NDArray[np.float32]) -> Quantisation:
    """Write the graphs as ``how`` says, and how far their logits on the model's batch are from ``reference``."""
    config, weights = model.config, model.weights
    peaks = fixed_peaks(config, weights, model.texts) if how.scheme == "calibrated" else {}
    write_graphs(folder, config, weights, how.scheme, how.bits, how.block_size, peaks, how.table_bits)
    found = compare(Graphs(folder, config).logits(model.batch), reference)
    return Quantisation(
        scheme=how.scheme,
        bits=how.bits_per_weight,
        block_size=how.block_size if how.scheme == "blockwise" else 0,
        table_bits=how.table_bits,
        parity_max_error=round(found.max_error, 6),
        parity_cosine=round(found.cosine, 6),
    )


def _manifest(recipe: Recipe, trained: Trained, config: TransformerConfig, quantisation: Quantisation) -> Manifest:
    return Manifest(
        name=recipe.name,
        revision=recipe.revision,
        description=recipe.description,
        tasks=(recipe.served_task,),
        languages=recipe.languages,
        config=config,
        max_input_tokens=recipe.export.max_input_tokens,
        max_output_tokens=recipe.export.max_output_tokens,
        special_ids=_special_ids(trained.tokenizer),
        labels=recipe.labels,
        no_answer_threshold=recipe.export.no_answer_threshold,
        generation=recipe.export.generation,
        chat_template=CHAT_TEMPLATE if recipe.task == "generate" else None,
        quantisation=quantisation,
        licence=recipe.licence,
        parent=trained.parent,
        training_data=tuple(
            TrainingData(name=part.title, licence=part.licence, rows=trained.rows[part.title], where=part.where)
            for part in trained.data
        ),
        training_energy=_training_energy(trained.lineage),
        lineage=trained.lineage,
    )


def _training_energy(lineage: Sequence[Stage]) -> TrainingEnergy:
    """All stages together; unknown where one of them is."""
    joules = [stage.joules for stage in lineage if stage.joules is not None]
    known = sum(joules) if len(joules) == len(lineage) else None
    return TrainingEnergy(
        joules=known,
        gco2e=gco2e(known),
        seconds=round(sum(stage.elapsed_s for stage in lineage), 1),
        quality=weakest(Quality(stage.quality) for stage in lineage).value,
    )


def _special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """The ids that the task's samples were made with (``training.tasks``)."""
    if tokenizer.token_to_id("[CLS]") is not None:
        pad, unk, cls, sep = (token_id(tokenizer, token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
        return SpecialIds(pad=pad, unk=unk, eos=sep, cls=cls, sep=sep)
    pad, bos, eos = (token_id(tokenizer, token) for token in (PAD, BOS, EOS))
    return SpecialIds(pad=pad, bos=bos, eos=eos)


def real_samples(recipe: Recipe, tokenizer: Tokenizer, data: Path, count: int = 256) -> list[Sample]:
    """About as many samples of each of the recipe's sets, ``count`` in all at most."""
    task = TASKS[recipe.served_task](recipe, tokenizer)
    parts = [rows for _, rows in load_rows(recipe, data)]
    return [
        sample
        for rows in parts
        for sample in islice((sample for row in rows for sample in task.samples(row)), max(1, count // len(parts)))
    ]


def parity_batch(samples: Sequence[Sample], size: int = 16) -> Batch:
    """A ragged batch, spread over all ``samples``."""
    return collate(samples[:: max(1, len(samples) // size)][:size], PAD_ID)


def one_by_one(samples: Iterable[Sample]) -> Iterator[Batch]:
    """A batch for each sample."""
    return (collate([sample], PAD_ID) for sample in samples)


@torch.no_grad()
def torch_logits(model: Transformer, batch: Batch) -> NDArray[np.float32]:
    """What the graphs compute on ``batch``, by the reference: class or span logits, or the next word's."""
    config, lengths = model.config, batch["lengths"]
    model.eval()
    rows = torch.arange(len(lengths))
    if config.head == "classify":
        return model.label_logits(model.encode(batch["ids"], lengths, batch.get("types")), lengths).numpy()
    if config.head == "span":
        real = torch.arange(batch["ids"].size(1)) < lengths[:, None]
        return model.span_logits(model.encode(batch["ids"], lengths, batch.get("types")))[real].numpy()
    if config.architecture == "encoder-decoder":
        memory = model.encode(batch["ids"], lengths)
        hidden = model.decode(batch["target"], memory=memory, memory_lengths=lengths)
        return model.word_logits(hidden[rows, batch["target_lengths"] - 1]).numpy()
    prefix = batch["prefix"] if config.architecture == "prefix-lm" else None
    hidden = model.decode(batch["ids"], prefix_lengths=prefix, token_types=batch.get("types"))
    return model.word_logits(hidden[rows, lengths - 1]).numpy()


def compare(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> Parity:
    """Largest difference and cosine of two arrays of logits; words that are ruled out (minus infinity) must be so in
    both, and count no further."""
    ruled_out = np.isneginf(wanted)
    if not np.array_equal(ruled_out, np.isneginf(found)):
        return Parity(np.inf, np.nan)
    a, b = found[~ruled_out].astype(np.float64), wanted[~ruled_out].astype(np.float64)
    return Parity(float(np.abs(a - b).max()), float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
