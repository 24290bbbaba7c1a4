"""One stage: somebody else's model in, a verified model folder out, as ``training.export`` writes it.

Knows nothing of what the weights are called elsewhere (``training.families``).
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer

from models.config import TransformerConfig
from models.manifest import NAME_PATTERN, Manifest, Parent, Quantisation, SpecialIds, Task
from training.errors import TrainingError
from training.export import PARITY_LIMIT, Finished, random_batch, write_model
from training.families import Foreign, load_foreign
from training.foreign import ForeignFolder
from training.foreign_tokenizer import read_tokenizer
from training.quantise import store_anew
from training.recipe import Storage
from training.tasks import Batch

_FILES = ("*.json", "1_Pooling/*.json", "*.spm", "*.jinja", "README.md", "model*.safetensors", "pytorch_model.bin")
_MAX_POSITIONS = 2048
"""What an imported model holds unless told otherwise, where it can."""
_MAX_TOKENS = 256
"""What a text gets that does not say how long it may become."""
_MOST_TEXTS = 128
"""On how many the model's activations are observed."""
_MOST_WRITTEN = 64
"""Tokens that it writes of each of them."""


def import_model(
    source: str | Path,
    out: Path,
    *,
    name: str | None = None,
    how: Storage | None = None,
    max_positions: int | None = None,
    source_language: str | None = None,
    target_language: str | None = None,
    texts: Path | None = None,
) -> Manifest:
    """Write ``out/<name>`` from a Hugging Face folder, or a name on the Hub, whose model is then fetched; or from a
    folder that was exported before, to store its matrices in another way.

    ``max_positions`` is the longest text that it will hold, by default of 2048 tokens, where the model itself can hold
    more; ``texts`` is a file with a text on each line, of the kind that it will read, which the calibrated scheme
    needs. Raises ``TrainingError`` for what is missing, and for what the graphs cannot express.
    """
    how = how or Storage()
    if how.scheme == "calibrated" and texts is None:
        raise TrainingError("the calibrated scheme needs --texts FILE, texts of the kind that the model will read")
    if how.scheme != "calibrated" and texts is not None:
        raise TrainingError(f"--texts fixes scales of activations, and {how.scheme} has none: add --scheme calibrated")
    if (Path(source) / "manifest.json").is_file():
        if source_language or target_language:
            raise TrainingError(f"{source}: its manifest says which languages it has; leave them out")
        if max_positions is not None:
            raise TrainingError(f"{source}: its manifest says how long its texts may be; leave --max-positions out")
        return store_anew(Path(source), out, name, how)
    folder = _folder(source)
    name = name or re.sub(r"[^a-z0-9._-]+", "-", Path(source).resolve().name.lower()).strip("-._")[:64]
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrainingError(f"{name!r} can be no model's name, which is like {NAME_PATTERN}: give --name")
    files = ForeignFolder(folder)
    most = _MAX_POSITIONS if max_positions is None else max_positions
    foreign = load_foreign(folder, most, files.pooling())
    config = foreign.config
    tokenizer = read_tokenizer(folder, target_language)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise TrainingError(f"{folder}: the tokenizer's id {largest} is beyond the model's {config.vocab_size} words")
    languages: tuple[str, ...] = (source_language or "und",)
    if config.architecture == "encoder-decoder":
        languages = files.language_pair(source_language, target_language)
    labels = _labels(foreign)
    writes = config.head == "lm"
    max_tokens = min(_MAX_TOKENS, config.max_positions // 2)
    special = files.special_ids(tokenizer)
    batch = random_batch(config, special.pad)
    reference = foreign.logits(batch)
    # What float32 keeps of logits that may be large: nobody knows what this model's are like.
    tolerance = PARITY_LIMIT * max(1.0, float(np.abs(reference[np.isfinite(reference)]).max()))
    observed = () if texts is None else _batches(foreign, tokenizer, special, _lines(texts))
    finished = Finished(name, config, foreign.weights, tokenizer, batch, reference, observed, tolerance)

    def describe(quantisation: Quantisation) -> Manifest:
        return Manifest(
            name=name,
            revision="1",
            description=f"{Path(source).name}, a {type(foreign.theirs).__name__}, imported.",
            tasks=_tasks(config),
            languages=languages,
            config=config,
            # A prompt shares the positions with what is written after it; a source has its own.
            max_input_tokens=config.max_positions - (max_tokens if config.architecture == "decoder" else 0),
            max_output_tokens=config.max_positions - 1 if writes else 0,
            special_ids=special,
            labels=labels,
            generation=files.generation(max_tokens) if writes else None,
            chat_template=files.chat_template() if config.architecture == "decoder" else None,
            quantisation=quantisation,
            licence=files.licence,
            parent=Parent(name=Path(source).name, relation="imported", licence=files.licence),
        )

    return write_model(finished, how, describe, out)


def _folder(source: str | Path) -> Path:
    """The model's folder on this machine. Raises ``TrainingError``."""
    if (Path(source) / "config.json").is_file():
        return Path(source)
    if Path(source).exists():
        raise TrainingError(f"{source}: holds no config.json, so it is not a folder that transformers has saved")
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise TrainingError(f"{source}: no such folder, nor a name that the Hub could know") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TrainingError(f"{source}: no such folder, and the Hub did not give it: {error}") from error


def _tasks(config: TransformerConfig) -> tuple[Task, ...]:
    match config.architecture, config.head:
        case "decoder", _:
            return ("generate",)
        case "encoder-decoder", _:
            return ("translate",)
        case _, "classify":
            return ("sentiment",)
        case _, "span":
            return ("answer",)
    return ()


def _labels(foreign: Foreign) -> tuple[str, ...]:
    """Of a classifier, in the order of its outputs. Raises ``TrainingError`` where they are no sentiments."""
    if foreign.config.head != "classify":
        return ()
    names = foreign.theirs.config.id2label or {}
    labels = tuple(str(name).lower() for _, name in sorted(names.items()))
    if sorted(labels) != ["negative", "neutral", "positive"]:
        raise TrainingError(
            f"config.json: id2label names {', '.join(labels)}; the one task for classifiers is sentiment, with the "
            "labels negative, neutral and positive"
        )
    return labels


def _lines(path: Path) -> list[str]:
    """The first texts of a file. Raises ``TrainingError``."""
    try:
        with path.open(encoding="utf-8") as file:
            lines = list(islice(filter(None, map(str.strip, file)), _MOST_TEXTS))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read: {error}") from error
    if not lines:
        raise TrainingError(f"{path}: holds no texts, which should be one a line")
    return lines


def _batches(foreign: Foreign, tokenizer: Tokenizer, special: SpecialIds, lines: list[str]) -> Iterator[Batch]:
    """Each line as the model reads it, with what an encoder-decoder itself writes of it."""
    config = foreign.config
    before = [] if special.cls is None else [special.cls]
    after = [special.eos] if config.architecture == "encoder-decoder" else [] if special.sep is None else [special.sep]
    room = config.max_positions - len(before) - len(after)
    for line in lines:
        ids = torch.tensor([[*before, *tokenizer.encode(line, add_special_tokens=False).ids[:room], *after]])
        batch = {"ids": ids, "lengths": torch.tensor([ids.size(1)])}
        if config.architecture == "encoder-decoder":
            target = foreign.written(ids, min(_MOST_WRITTEN, config.max_positions - 1))
            batch |= {"target": target, "target_lengths": torch.tensor([target.size(1)])}
        yield batch
