"""What is learned from text alone: the next token, masked tokens, spans that were cut out, the rest of a text.

Each objective turns a block of a corpus into a sample; what it hides is drawn from a generator that it is given, so
that the same seed, epoch and block always give the same. Knows nothing of files or optimisers.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.transformer import Transformer
from training.data import Fields, clean
from training.formats import Row
from training.recipe import Objective as Name
from training.recipe import Recipe
from training.tasks import IGNORED, Batch, Generate, Loss, Sample, Summarize, Translate
from training.tokenizer import sentinels, special_ids, token_id

HIDDEN_SHARE = 0.15
"""Of a block's tokens, for masks (Devlin et al. 2019) and spans (Raffel et al. 2020) alike."""
MEAN_SPAN = 3
"""Tokens of a span that is cut out."""


class Objective(Loss, Protocol):
    """The seam between an objective and the loop."""

    fields: ClassVar[Fields]
    size: int
    """Tokens from the begin of one block to that of the next."""
    behind: int
    """Tokens behind a block that its sample needs too."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None: ...

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """The text of a row."""

    def sample(self, ids: list[int], rng: np.random.Generator) -> Sample:
        """A sample from ``size + behind`` tokens."""


class _OfText:
    """What all objectives read."""

    fields: ClassVar[Fields] = (("text",),)

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """The text."""
        yield clean(row["text"])


class Causal(_OfText, Generate):
    """The next token of a decoder."""

    behind = 1

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        super().__init__(recipe, tokenizer)
        self.size = recipe.max_tokens

    def sample(self, ids: list[int], rng: np.random.Generator) -> Sample:
        """Every token is the label of the one before."""
        return Sample(ids[:-1], labels=ids[1:])


class Masked(_OfText):
    """Hidden tokens of an encoder: of 15%, 80% are masked, 10% replaced and 10% left as they are (BERT)."""

    behind = 0

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.cls, self.sep, self.mask = (token_id(tokenizer, token) for token in ("[CLS]", "[SEP]", "[MASK]"))
        self.size = recipe.max_tokens - 2
        special = special_ids(tokenizer)
        self.words = np.array([id for id in range(tokenizer.get_vocab_size()) if id not in special])

    def sample(self, ids: list[int], rng: np.random.Generator) -> Sample:
        """[CLS] block [SEP], with labels at the hidden tokens only; end marks are never hidden."""
        read = np.array([self.cls, *ids, self.sep])
        places = np.flatnonzero(np.isin(read, self.words))
        chosen = rng.permutation(places)[: max(1, round(HIDDEN_SHARE * len(places)))]
        labels = np.full(len(read), IGNORED)
        labels[chosen] = read[chosen]
        fate = rng.random(len(chosen))
        read[chosen[fate < 0.8]] = self.mask
        replaced = chosen[(fate >= 0.8) & (fate < 0.9)]
        read[replaced] = rng.choice(self.words, len(replaced))
        return Sample(read.tolist(), labels=labels.tolist())

    def count(self, batch: Batch) -> Sequence[float]:
        """Hidden tokens."""
        return [(batch["labels"] != IGNORED).sum().item()]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of the hidden tokens."""
        hidden, labels = model.encode(batch["ids"], batch["lengths"]), batch["labels"]
        counted = labels != IGNORED
        return [F.cross_entropy(model.word_logits(hidden[counted]).float(), labels[counted], reduction="sum")]


class Denoise(_OfText, Translate):
    """Spans cut out of what the encoder reads, each behind its sentinel for the decoder to write (T5)."""

    behind = 0

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        super().__init__(recipe, tokenizer)
        self.size = recipe.max_tokens
        self.sentinels = [token_id(tokenizer, token) for token in sentinels(n_spans(self.size))]

    def sample(self, ids: list[int], rng: np.random.Generator) -> Sample:
        """The block with a sentinel for each span, and the spans behind theirs."""
        spans = n_spans(len(ids))
        hidden = max(1, round(HIDDEN_SHARE * len(ids)))
        read: list[int] = []
        target = [self.bos]
        place = 0
        for kept, cut, sentinel in zip(
            _parts(len(ids) - hidden, spans, rng), _parts(hidden, spans, rng), self.sentinels, strict=False
        ):
            read += [*ids[place : place + kept], sentinel]
            target += [sentinel, *ids[place + kept : place + kept + cut]]
            place += kept + cut
        return Sample([*read, self.eos], target=[*target, self.eos])


def n_spans(size: int) -> int:
    """Spans cut out of a block."""
    return max(1, round(HIDDEN_SHARE * size / MEAN_SPAN))


def _parts(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """``total`` cut into ``parts`` of at least 1, every way equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()  # type: ignore[no-any-return]


class Prefix(_OfText, Summarize):
    """The rest of a text whose beginning a prefix LM reads in both directions, parted at random (UniLM)."""

    behind = 0

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        super().__init__(recipe, tokenizer)
        self.cls, self.size = token_id(tokenizer, "[CLS]"), recipe.max_tokens - 2

    def sample(self, ids: list[int], rng: np.random.Generator) -> Sample:
        """[CLS] beginning [SEP] rest, as a document and its summary stand; the [SEP] writes the rest's first token."""
        split = int(rng.integers(1, len(ids)))
        prefix, rest = [self.cls, *ids[:split], self.eos], ids[split:]
        labels = [IGNORED] * (len(prefix) - 1) + [*rest, IGNORED]
        return Sample([*prefix, *rest], types=[0] * len(prefix) + [1] * len(rest), prefix=len(prefix), labels=labels)

    def count(self, batch: Batch) -> Sequence[float]:
        """Tokens of the rests."""
        return [(batch["labels"] != IGNORED).sum().item()]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of the rests' tokens."""
        hidden = model.decode(batch["ids"], prefix_lengths=batch["prefix"], token_types=batch["types"])
        written = batch["labels"] != IGNORED
        logits = model.word_logits(hidden[written]).float()
        return [F.cross_entropy(logits, batch["labels"][written], reduction="sum")]


OBJECTIVES: dict[Name, type[Objective]] = {
    "causal": Causal,
    "masked": Masked,
    "denoise": Denoise,
    "prefix": Prefix,
}
