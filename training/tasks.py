"""What each task reads, writes and minimises. Knows nothing of optimisers, files or export.

A *sample* is one encoded example; a *batch* is its samples, right-padded, as tensors. Every task is one class with
the same five verbs, and one line in ``TASKS``.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.sentences import split_sentences
from models.transformer import Transformer
from training.data import Fields, clean
from training.errors import TrainingError
from training.formats import Row
from training.recipe import Recipe
from training.tokenizer import BOS, CHAT_TOKENS, EOS, token_id

IGNORED = -100
"""The label of a position that no loss counts."""

UNKNOWN_LIMIT = 0.2
"""Share of unknown words above which a tokenizer is not for a text."""

Batch = dict[str, Tensor]


@dataclass(slots=True)
class Sample:
    """One encoded example; which fields it has depends on the task."""

    ids: list[int]
    """What the encoder, decoder or prefix LM reads."""
    types: list[int] | None = None
    prefix: int = 0
    target: list[int] | None = None
    """What an encoder-decoder writes, with begin and end."""
    labels: list[int] | None = None
    """A class, a start and end, or one label per position."""
    extract: bool = False
    """Whether ``labels`` mark sentences (1, 0) instead of naming words."""
    task: int = 0
    """Which of a run's tasks it is for."""

    @property
    def length(self) -> int:
        """Tokens that the model computes for it."""
        return len(self.ids) + (len(self.target) if self.target else 0)


class Loss(Protocol):
    """What is minimised."""

    def count(self, batch: Batch) -> Sequence[float]:
        """Targets of each part of the loss in a batch, weighed as the loss weighs them.

        The loss that is minimised is, over all that make up one step, each part's sum over its count, added up: so a
        step is the same in however many batches, on however many devices, it is computed.
        """

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Each part of the loss, summed over its targets: float32 scalars.

        A part without targets in this batch is a zero that was computed with the same weights, so that every device
        waits for the same gradients. Every tensor is made on the batch's device.
        """


class TaskTraining(Loss, Protocol):
    """The seam between a task and the loop."""

    fields: ClassVar[Fields]
    """What every row must have; of several sets of fields, the first that it has."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None: ...

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """The texts of a row that the tokenizer learns from."""

    def samples(self, row: Row) -> Iterator[Sample]:
        """Encode a row; a long one may give several samples, a useless one none."""


def mean_loss(task: Loss, model: Transformer, batch: Batch) -> Tensor:
    """The loss of a batch that is a whole step by itself."""
    parts = zip(task.loss(model, batch), task.count(batch), strict=True)
    return torch.stack([total / (count or 1.0) for total, count in parts]).sum()


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-pad to ``(rows, longest)`` int64."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Right-pad the samples' fields and add their lengths."""
    batch = {
        "ids": pad([sample.ids for sample in samples], pad_id),
        "lengths": torch.tensor([len(sample.ids) for sample in samples]),
        "prefix": torch.tensor([sample.prefix for sample in samples]),
        "extract": torch.tensor([sample.extract for sample in samples]),
        "task": torch.tensor([sample.task for sample in samples]),
    }
    for name, value in (("types", 0), ("target", pad_id), ("labels", IGNORED)):
        rows = [getattr(sample, name) for sample in samples]
        if rows[0] is not None:
            batch[name] = pad(rows, value)
    if "target" in batch:
        batch["target_lengths"] = torch.tensor([len(sample.target or ()) for sample in samples])
    return batch


def check_known(name: str, tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> None:
    """Raise ``TrainingError`` where a tokenizer knows too little of what it has read as ``ids``."""
    unknown = tokenizer.token_to_id("[UNK]")
    if unknown is None:
        return
    share = sum(each.count(unknown) for each in ids) / max(1, sum(map(len, ids)))
    if share > UNKNOWN_LIMIT:
        raise TrainingError(
            f"{name}: the tokenizer does not know {share:.0%} of the words of its data, so it belongs to other texts "
            "or another language: start from another model, or learn one: tokenizer.kind = 'byte-bpe' or 'word-piece'"
        )


class Sentiment:
    """Mean cross-entropy over the labels, each label weighing the same in sum: macro recall is what is scored."""

    fields: ClassVar[Fields] = (("text", "label"),)

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.labels, self.smoothing = recipe.labels, recipe.fit.label_smoothing
        self.max_tokens, self.tokenizer = recipe.max_tokens, tokenizer
        self.counts = torch.zeros(len(self.labels))

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """The text."""
        yield clean(row["text"])

    def samples(self, row: Row) -> Iterator[Sample]:
        """One sample."""
        label = self.labels.index(row["label"])
        self.counts[label] += 1
        ids = self.tokenizer.encode(clean(row["text"])).ids
        yield Sample(ids=[*ids[: self.max_tokens - 1], ids[-1]] if len(ids) > self.max_tokens else ids, labels=[label])

    def _weights(self) -> Tensor:
        return self.counts.sum() / (len(self.labels) * self.counts.clamp(min=1))

    def count(self, batch: Batch) -> Sequence[float]:
        """The labels' weights."""
        return [self._weights().to(batch["labels"].device)[batch["labels"][:, 0]].sum().item()]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Weighted cross-entropy of the labels."""
        logits = model.label_logits(model.encode(batch["ids"], batch["lengths"]), batch["lengths"]).float()
        weights = self._weights().to(logits.device)
        smoothing = self.smoothing
        return [F.cross_entropy(logits, batch["labels"][:, 0], weights, label_smoothing=smoothing, reduction="sum")]


class Answer:
    """Start and end of the answer among the context's tokens; the first token ([CLS]) stands for no answer."""

    fields: ClassVar[Fields] = (("context", "question", "answers"),)
    stride = 128
    """Context tokens that neighbouring windows share, at most half of a window."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.max_tokens = tokenizer, recipe.max_tokens
        self.cls, self.sep = token_id(tokenizer, "[CLS]"), token_id(tokenizer, "[SEP]")

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """Context and question."""
        yield row["context"]
        yield row["question"]

    def samples(self, row: Row) -> Iterator[Sample]:
        """One sample a window. Of a question with an answer, only the window that holds it whole."""
        question = self.tokenizer.encode(row["question"], add_special_tokens=False).ids[:64]
        context = self.tokenizer.encode(row["context"], add_special_tokens=False)
        offset = len(question) + 2
        room = self.max_tokens - offset - 1
        first = last = -1
        if row["answers"]:
            start = row["answers"][0]["start"]
            end = start + len(row["answers"][0]["text"])
            covered = [index for index, (a, b) in enumerate(context.offsets) if a < end and b > start]
            if not covered:
                return
            first, last = covered[0], covered[-1]
        shared = min(self.stride, room // 2)
        for begin in range(0, max(1, len(context.ids) - shared), room - shared):
            window = context.ids[begin : begin + room]
            inside = begin <= first and last < begin + len(window)
            if row["answers"] and not inside:
                continue
            span = [first - begin + offset, last - begin + offset] if row["answers"] else [0, 0]
            ids = [self.cls, *question, self.sep, *window, self.sep]
            yield Sample(ids, types=[0] * offset + [1] * (len(window) + 1), labels=span)
            if row["answers"]:
                return

    def count(self, batch: Batch) -> Sequence[float]:
        """A start and an end of each sample."""
        return [batch["labels"].numel()]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of start and end over [CLS] and the context's tokens."""
        logits = model.span_logits(model.encode(batch["ids"], batch["lengths"], batch["types"])).float()
        logits = logits.masked_fill(~span_positions(batch)[..., None], -1e4)
        return [F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), batch["labels"].flatten(), reduction="sum")]


def span_positions(batch: Batch) -> Tensor:
    """Where an answer can start or end, and [CLS], which stands for none: ``(b, s)``."""
    types = batch["types"]
    position = torch.arange(types.size(1), device=types.device)
    # The last real token is [SEP], type 1 like the context, and no answer either.
    allowed = (types == 1) & (position < batch["lengths"][:, None] - 1)
    allowed[:, 0] = True
    return allowed


class Translate:
    """Label-smoothed cross-entropy of the next word, the source read by the encoder."""

    fields: ClassVar[Fields] = (("source", "target"),)

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.bos, self.eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """Source and target: one vocabulary for both languages."""
        yield clean(row["source"])
        yield clean(row["target"])

    def samples(self, row: Row) -> Iterator[Sample]:
        """One sample; pairs that are empty or longer than the recipe allows are left out."""
        source = self.tokenizer.encode(clean(row["source"])).ids
        target = self.tokenizer.encode(clean(row["target"]), add_special_tokens=False).ids
        if target and 1 < len(source) <= self.recipe.max_tokens and len(target) < self.recipe.max_target_tokens:
            yield Sample(source, target=[self.bos, *target, self.eos])

    def count(self, batch: Batch) -> Sequence[float]:
        """Written tokens, the end mark too."""
        return [int((batch["target_lengths"] - 1).sum())]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of each target token given those before it."""
        memory = model.encode(batch["ids"], batch["lengths"])
        target, lengths = batch["target"], batch["target_lengths"]
        hidden = model.decode(target[:, :-1], memory=memory, memory_lengths=batch["lengths"])
        real = torch.arange(target.size(1) - 1, device=target.device) < lengths[:, None] - 1
        logits = model.word_logits(hidden[real]).float()
        smoothing = self.recipe.fit.label_smoothing if model.training else 0.0
        return [F.cross_entropy(logits, target[:, 1:][real], label_smoothing=smoothing, reduction="sum")]


class Summarize:
    """A prefix LM: the document is read in both directions, the summary written after it.

    Rows of ``extractive`` sets instead mark the sentences of the document that their summary holds.
    """

    fields: ClassVar[Fields] = (("document", "summary"),)

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.eos = token_id(tokenizer, "[SEP]")

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """Document and summary."""
        yield clean(row["document"])
        yield clean(row["summary"])

    def samples(self, row: Row) -> Iterator[Sample]:
        """One sample; the document is cut to leave room for the summary."""
        document, summary = clean(row["document"]), clean(row["summary"])
        encoding = self.tokenizer.encode(document)
        if row.get("extractive"):
            yield from self._extract_sample(document, summary, encoding.ids, encoding.offsets)
            return
        written = self.tokenizer.encode(summary, add_special_tokens=False).ids[: self.recipe.max_target_tokens - 1]
        room = self.recipe.max_tokens - len(written) - 1
        prefix = encoding.ids if len(encoding.ids) <= room else [*encoding.ids[: room - 1], self.eos]
        if not written or len(prefix) < 3:
            return
        # The prefix's last position writes the first word, the last word writes the end.
        labels = [IGNORED] * (len(prefix) - 1) + [*written, self.eos]
        types = [0] * len(prefix) + [1] * len(written)
        yield Sample([*prefix, *written], types=types, prefix=len(prefix), labels=labels)

    def _extract_sample(
        self, document: str, summary: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> Iterator[Sample]:
        ids = ids[: self.recipe.max_tokens]
        starts = [start for start, _ in offsets[1 : len(ids)]]  # without [CLS], whose offset is (0, 0)
        labels = [IGNORED] * len(ids)
        told = "".join(filter(str.isalnum, summary))
        for start, end in split_sentences(document):
            position = 1 + bisect_left(starts, start)
            if position < len(ids) - 1:
                labels[position] = int("".join(filter(str.isalnum, document[start:end])) in told)
        yield Sample(ids, types=[0] * len(ids), prefix=len(ids), labels=labels, extract=True)

    @staticmethod
    def _targets(batch: Batch) -> tuple[Tensor, Tensor]:
        """Where words are written, and where sentences are marked: ``(b, s)``."""
        counted = batch["labels"] != IGNORED
        return counted & ~batch["extract"][:, None], counted & batch["extract"][:, None]

    def count(self, batch: Batch) -> Sequence[float]:
        """Written words, and sentences."""
        return [int(targets.sum()) for targets in self._targets(batch)]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of the summary's words, and of the marks on sentences."""
        hidden = model.decode(batch["ids"], prefix_lengths=batch["prefix"], token_types=batch["types"])
        labels, (words, marks) = batch["labels"], self._targets(batch)
        smoothing = self.recipe.fit.label_smoothing if model.training else 0.0
        logits = model.word_logits(hidden[words]).float()
        found = model.extract_logits(hidden)[marks].float()
        return [
            F.cross_entropy(logits, labels[words], label_smoothing=smoothing, reduction="sum"),
            F.binary_cross_entropy_with_logits(found, labels[marks].float(), reduction="sum"),
        ]


_LOOSE = re.compile(r" +([.,!?;:)%])| ([’']) ?(?=(?:s|t|re|m|ve|ll|d)\b)")


def _tidy(text: str) -> str:
    """Clean, and join the punctuation that tokenised dialogues leave apart (``It ' s fine .``)."""
    return _LOOSE.sub(r"\1\2", clean(text))


class Generate:
    """Cross-entropy of the next token; texts are packed end to end, chats are written in their template."""

    fields: ClassVar[Fields] = (("text",), ("prompt", "response"))

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.recipe = tokenizer, recipe
        self.eos = token_id(tokenizer, EOS)
        self.user, self.assistant = (token_id(tokenizer, token) for token in CHAT_TOKENS)
        self._packed: list[int] = []

    @staticmethod
    def texts(row: Row) -> Iterator[str]:
        """The text, or each turn of the chat."""
        if "text" in row:
            yield clean(row["text"])
        else:
            yield _tidy(row["prompt"])
            yield _tidy(row["response"])

    def samples(self, row: Row) -> Iterator[Sample]:
        """As many full blocks as the rows so far have filled; the rest waits for the next row."""
        size = self.recipe.max_tokens
        self._packed += self._encode(row)
        while len(self._packed) > size:
            # One token is shared by neighbouring blocks: it is the last label of one and the first input of the next.
            yield Sample(self._packed[:size], labels=self._packed[1 : size + 1])
            del self._packed[:size]

    def _encode(self, row: Row) -> list[int]:
        if "text" in row:
            return [*self.tokenizer.encode(clean(row["text"])).ids, self.eos]
        turns = [*_tidy(row["prompt"]).split("\n"), _tidy(row["response"])]
        ids: list[int] = []
        # The last turn is the assistant's, so roles are told from the end.
        for index, turn in enumerate(turns):
            role = self.assistant if (len(turns) - index) % 2 else self.user
            ids += [role, *self.tokenizer.encode(turn.strip()).ids, self.eos]
        return ids

    def count(self, batch: Batch) -> Sequence[float]:
        """Every token."""
        return [batch["labels"].numel()]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """Cross-entropy of every next token."""
        logits = model.word_logits(model.decode(batch["ids"])).float()
        return [F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")]


TASKS: dict[str, type[TaskTraining]] = {
    "sentiment": Sentiment,
    "answer": Answer,
    "translate": Translate,
    "summarize": Summarize,
    "generate": Generate,
}
