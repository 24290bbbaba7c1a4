"""Several tasks in one run: one trunk, a head for each. Knows nothing of data files, optimisers or export."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from models.config import TransformerConfig
from models.transformer import Transformer
from training.data import draw, mixed
from training.errors import TrainingError
from training.tasks import Batch, Loss

_SHARED = ("style", "vocab_size", "d_model", "n_heads", "d_ff", "max_positions", "n_token_types", "norm_eps")
"""What heads on one trunk must agree on, besides its layers."""


class Together(Transformer):
    """The first task's Transformer, with others beside it whose embeddings and layers are its own.

    Its state has the first task's weights under their usual names, so that a fine-tuning run can start from it.
    """

    def __init__(self, config: TransformerConfig, others: Sequence[TransformerConfig], dropout: float = 0.0) -> None:
        """Raises ``TrainingError`` naming the field in which two tasks' models differ."""
        super().__init__(config, dropout)
        self.others = nn.ModuleList(self._beside(each, dropout) for each in others)

    def _beside(self, config: TransformerConfig, dropout: float) -> Transformer:
        for name in _SHARED:
            ours, theirs = getattr(self.config, name), getattr(config, name)
            if ours != theirs:
                raise TrainingError(f"model.{name}: tasks on one trunk have the same; {ours} and {theirs} are not")
        stacks, its_stacks = _stacks(self.config), _stacks(config)
        if [depth for _, depth in stacks] != [depth for _, depth in its_stacks]:
            raise TrainingError(f"model: tasks on one trunk have the same layers; {stacks} and {its_stacks} are not")
        other = Transformer(config, dropout)
        other.embed = self.embed
        for (ours, _), (theirs, _) in zip(stacks, its_stacks, strict=True):
            # An encoder's layers are those of a prefix LM; only what they may see differs.
            for part in ("", "_norm"):
                if hasattr(self, ours + part):
                    setattr(other, theirs + part, getattr(self, ours + part))
        if config.head == "lm" and config.style == "bert":
            nn.init.eye_(other.head.dense.weight)  # as a trunk's own head begins
        return other

    @property
    def members(self) -> list[Transformer]:
        """The model of each task, in the order of the recipes."""
        return [self, *self.others]


class JointLoss:
    """The loss of the task that a batch is of, with that task's model of a ``Together``."""

    def __init__(self, tasks: Sequence[Loss]) -> None:
        self.tasks = tasks

    def count(self, batch: Batch) -> Sequence[float]:
        """Targets of the batch's task."""
        return self.tasks[int(batch["task"][0])].count(batch)

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """The parts of its loss."""
        assert isinstance(model, Together)
        number = int(batch["task"][0])
        return self.tasks[number].loss(model.members[number], batch)


def _stacks(config: TransformerConfig) -> list[tuple[str, int]]:
    """Names and depths of the stacks that a model has."""
    return [
        (name, depth)
        for name, depth in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers))
        if depth
    ]


def joined_batches(
    tasks: Sequence[Sequence[Sequence[int]]], firsts: Sequence[int], temperature: float, seed: int, epoch: int
) -> list[list[int]]:
    """An epoch of every task's batches in random order, each of one task, its samples numbered from ``firsts``.

    As many as the tasks have together; of a task with more than its part, other ones in each epoch.
    """
    counts = mixed([len(batches) for batches in tasks], temperature)
    joined = [
        [first + index for index in batches[number]]
        for task, (batches, first, count) in enumerate(zip(tasks, firsts, counts, strict=True))
        for number in draw(len(batches), count, (seed, task), epoch).tolist()
    ]
    np.random.default_rng((seed, epoch)).shuffle(joined)
    return joined
