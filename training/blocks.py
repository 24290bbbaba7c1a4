"""The data of a pretraining run: texts streamed from their sets, made unique, tokenised once, drawn as blocks.

Knows nothing of optimisers. Whatever is drawn comes from (seed, epoch, block), so a resumed run sees the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from models.transformer import Transformer
from training.corpus import CORPUS, Corpus, Dropped, Texts, fingerprint, open_corpus, unique_texts, write_corpus
from training.data import draw, mixed, read_set, set_files
from training.errors import TrainingError
from training.pretrain import OBJECTIVES, Objective
from training.recipe import EvaluateRecipe, Recipe, SetRecipe
from training.recipe import Objective as Name
from training.tasks import Sample, check_known, collate, mean_loss
from training.tokenizer import EOS, PAD_ID, token_id

HELD_OUT_TOKENS = 1 << 18
"""Of each set, so that the loss on unseen text is known in a minute or two without an accelerator."""


@dataclass(frozen=True)
class BlockBatches(Sequence[Sequence[int]]):
    """Batches of ``size`` places of ``order``, the last one shorter; 8 bytes a block."""

    order: NDArray[np.int64]
    size: int

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(len(self.order) / self.size)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        """One batch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[index * self.size : (index + 1) * self.size].tolist()  # type: ignore[no-any-return]


class Blocks(Sequence[Sample]):
    """A corpus as samples of an objective, by their places in the run."""

    def __init__(self, recipe: Recipe, corpus: Corpus, objective: Objective) -> None:
        """Raises ``TrainingError`` where not one block is full, or none fits into a batch."""
        self._corpus, self._objective, self._seed = corpus, objective, recipe.fit.seed
        self._starts = corpus.starts(objective.size)
        self._begins = np.concatenate(self._starts)
        self._batch = recipe.fit.batch_tokens // recipe.max_tokens
        counts = [len(starts) for starts in self._starts]
        shares = [part.share * count for part, count in zip(recipe.data, counts, strict=True)]
        self._counts = mixed(shares, recipe.mix.temperature)
        if not sum(self._counts):
            raise TrainingError(f"{recipe.name}: its data fills no block of {recipe.max_tokens} tokens")
        if not self._batch:
            raise TrainingError(f"{recipe.name}: raise fit.batch_tokens to at least max_tokens, {recipe.max_tokens}")

    @property
    def per_epoch(self) -> int:
        """Samples of an epoch."""
        return sum(self._counts)

    def batches(self, epoch: int) -> BlockBatches:
        """The places of an epoch's blocks in the run; of a set that has more than its part, other ones each epoch."""
        first = np.cumsum([0, *map(len, self._starts)])
        drawn = [
            begin + draw(len(starts), count, (self._seed, number), epoch)
            for number, (begin, starts, count) in enumerate(zip(first, self._starts, self._counts, strict=False))
            if count and len(starts)
        ]
        order = np.random.default_rng((self._seed, epoch)).permutation(np.concatenate(drawn))
        return BlockBatches(epoch * int(first[-1]) + order, self._batch)

    def __len__(self) -> int:
        """Places of an epoch; those of the next one follow."""
        return len(self._begins)

    def __getitem__(self, place: int) -> Sample:  # type: ignore[override]
        """What the objective makes of a block in an epoch."""
        epoch, block = divmod(place, len(self._begins))
        begin = self._begins[block]
        ids = self._corpus.ids[begin : begin + self._objective.size + self._objective.behind].tolist()
        return self._objective.sample(ids, np.random.default_rng((self._seed, epoch, block)))


def prepare(
    recipe: Recipe, data: Path, run: Path, make_tokenizer: Callable[[Iterable[str]], Tokenizer]
) -> tuple[Tokenizer, Objective, Blocks, dict[str, int]]:
    """Everything that a pretraining run reads, and the rows of each set; from disk where the run has it already.

    ``make_tokenizer`` learns from texts, or loads what the run has. Raises ``TrainingError``.
    """
    kind = OBJECTIVES[objective_of(recipe)]
    sets: dict[str, Texts] = {part.title: partial(_texts, data, part, kind) for part in recipe.data}
    dropped = None
    if not (run / CORPUS).exists():
        evaluated = chain.from_iterable(_texts(data, each, kind) for each in recipe.evaluate)
        sets, dropped = unique_texts(sets, evaluated, run)
    tokenizer = make_tokenizer(chain.from_iterable(texts() for texts in sets.values()))
    files = [file for part in (*recipe.data, *recipe.evaluate) for file in set_files(data, part)]
    made_from = fingerprint(
        files, tokenizer, *(part.model_dump_json(include={"path", "split", "columns"}) for part in recipe.data)
    )
    if dropped is None:
        corpus = open_corpus(run, made_from)
    else:
        corpus = write_corpus(sets, tokenizer, _end(tokenizer), run, made_from)
        print(_said(recipe, corpus, dropped))
    check_known(recipe.name, tokenizer, [corpus.ids[:HELD_OUT_TOKENS].tolist()])
    objective = kind(recipe, tokenizer)
    return tokenizer, objective, Blocks(recipe, corpus, objective), corpus.rows


def objective_of(recipe: Recipe) -> Name:
    """The objective. Raises ``TrainingError`` for a recipe of another task."""
    if recipe.objective is None:
        raise TrainingError(f"{recipe.name}: no pretraining recipe")
    return recipe.objective


def _texts(data: Path, part: SetRecipe, kind: type[Objective]) -> Iterator[str]:
    return chain.from_iterable(kind.texts(row) for row in read_set(data, part, kind.fields))


def _end(tokenizer: Tokenizer) -> int:
    return token_id(tokenizer, EOS if tokenizer.token_to_id("[SEP]") is None else "[SEP]")


def _said(recipe: Recipe, corpus: Corpus, dropped: Dropped) -> str:
    left = ", ".join(f"{count:,} {reason}" for reason, count in asdict(dropped).items())
    return f"{recipe.name}: {sum(corpus.rows.values()):,} texts, {len(corpus.ids):,} tokens; dropped: {left}"


@torch.no_grad()
def held_out_loss(
    model: Transformer, tokenizer: Tokenizer, recipe: Recipe, each: EvaluateRecipe, data: Path
) -> dict[str, float]:
    """Mean loss in nats a target on text that the run has not seen, and bits per byte of a causal objective.

    What is hidden is drawn from the block alone, so that runs can be compared. Raises ``TrainingError``.
    """
    kind = OBJECTIVES[objective_of(recipe)]
    objective = kind(recipe, tokenizer)
    ids: list[int] = []
    n_bytes = 0
    for text in _texts(data, each, kind):
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, _end(tokenizer)]
        n_bytes += len(text.encode()) + 1
        if len(ids) >= HELD_OUT_TOKENS:
            break
    size = objective.size + objective.behind
    begins = range(0, len(ids) - size + 1, objective.size)
    samples = (
        objective.sample(ids[begin : begin + size], np.random.default_rng(number))
        for number, begin in enumerate(begins)
    )
    losses: list[float] = []
    with tqdm(total=len(begins), desc=f"reading {each.path}", unit="block", mininterval=1.0) as bar:
        while batch := list(islice(samples, max(1, recipe.fit.batch_tokens // recipe.max_tokens))):
            losses += [mean_loss(objective, model, collate(batch, PAD_ID)).item()] * len(batch)
            bar.update(len(batch))
    if not losses:
        raise TrainingError(f"{each.path}: fills no block of {recipe.max_tokens} tokens")
    loss = float(np.mean(losses))
    found = {"loss": loss}
    if recipe.objective == "causal":
        found["bits per byte"] = loss * len(ids) / n_bytes / math.log(2)
    return found
