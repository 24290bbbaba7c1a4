"""How fast a shape trains on this machine: some seconds of the real loop on a sample of real data. Knows nothing of
budgets."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from energy.host import Moment
from models.config import TransformerConfig
from models.transformer import Transformer
from training.data import batches_by_tokens
from training.errors import TrainingError
from training.flops import TextSize
from training.formats import Row
from training.loop import fit_model
from training.recipe import Precision, Recipe
from training.records import Progress
from training.tasks import IGNORED, TASKS, Sample, TaskTraining
from training.train import learn_tokenizer, work_on

SAMPLE_CHARACTERS, SAMPLE_ROWS = 2_000_000, 2000
"""What the tokenizer of a sample is learned from, and how many rows tell how long a text is."""
MEASURED_S, LEAST_STEPS, MOST_STEPS = 10.0, 2, 50
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float32")


@dataclass(frozen=True)
class Texts:
    """A sample of a recipe's data as its model would read it."""

    task: TaskTraining
    """Whose ``samples`` they are."""
    samples: Sequence[Sample]
    size: TextSize
    """The mean sample."""
    tokens: float
    """Of the mean sample."""
    epoch_tokens: float
    """Of all rows."""


@dataclass(frozen=True)
class Speed:
    """What some seconds of training a shape have shown; None is unknown."""

    tokens_per_s: float
    joules_per_token: float | None
    quality: str
    seconds: float
    threads: int
    foreign_cores: float | None
    """Cores that other processes kept busy meanwhile: on a quiet machine it would have been faster."""
    precision: Precision
    """The faster one: without instructions for it bfloat16 is several times slower than float32."""

    @property
    def watts(self) -> float | None:
        """Of the whole machine."""
        return None if self.joules_per_token is None else self.joules_per_token * self.tokens_per_s


def read_texts(base: Recipe, vocab_size: int, rows: Sequence[Row]) -> Texts:
    """A sample of ``rows``, encoded with a tokenizer of ``vocab_size`` words learned from some of them."""
    order = np.random.default_rng(base.fit.seed).permutation(len(rows))
    task, characters = TASKS[base.task], 0
    learned_from: list[str] = []
    for text in chain.from_iterable(task.texts(rows[index]) for index in order):
        learned_from.append(text)
        characters += len(text)
        if characters > SAMPLE_CHARACTERS:
            break
    sized = base.tokenizer.model_copy(update={"vocab_size": vocab_size})
    tokenizer, _ = learn_tokenizer(base.model_copy(update={"tokenizer": sized}), learned_from)
    encoder = task(base, tokenizer)
    picked = order[:SAMPLE_ROWS]
    samples = [sample for index in picked for sample in encoder.samples(rows[index])]
    if not samples:
        raise TrainingError(f"{base.name}: no row gives a usable sample; check max_tokens and the data")
    tokens = sum(sample.length for sample in samples)
    size = _mean_size(base.model, samples)
    return Texts(encoder, samples, size, tokens / len(samples), tokens / len(picked) * len(rows))


def _mean_size(config: TransformerConfig, samples: Sequence[Sample]) -> TextSize:
    """Of the samples: what is read and written, and at how many positions a word is chosen."""
    written = float(np.mean([len(sample.target or (0,)) - 1 for sample in samples]))
    if config.head != "lm":
        words = 0.0
    elif config.has_encoder:
        words = written
    else:
        chosen = (0 if s.extract else sum(label != IGNORED for label in s.labels or ()) for s in samples)
        words = sum(chosen) / len(samples)
    return TextSize(float(np.mean([len(sample.ids) for sample in samples])), written, words)


def measure(base: Recipe, config: TransformerConfig, texts: Texts) -> Speed:
    """Train a model of this shape for some seconds, in the faster precision, and forget it."""
    torch.manual_seed(base.fit.seed)
    model = Transformer(config, base.fit.dropout)
    lengths = [sample.length for sample in texts.samples]
    batches = batches_by_tokens(lengths, base.fit.batch_tokens, base.fit.seed, 0)

    def run(steps: int, precision: Precision) -> Progress:
        with tempfile.TemporaryDirectory() as scratch:
            fit = base.fit.model_copy(update={"epochs": steps / len(batches), "precision": precision})
            return fit_model(model, fit, work_on(texts.task, texts.samples, lambda _: batches), Path(scratch))

    run(1, base.fit.precision)  # the first step allocates what the others reuse
    step_s = {precision: run(1, precision).elapsed_s for precision in PRECISIONS}
    faster = min(PRECISIONS, key=step_s.__getitem__)
    began = Moment.now()
    found = run(max(LEAST_STEPS, min(MOST_STEPS, round(MEASURED_S / step_s[faster]))), faster)
    joules = None if found.joules is None else found.joules / found.tokens
    return Speed(
        tokens_per_s=found.tokens / found.elapsed_s,
        joules_per_token=joules,
        quality=found.quality,
        seconds=found.elapsed_s,
        threads=torch.get_num_threads(),
        foreign_cores=Moment.now().foreign_cores(began),
        precision=faster,
    )
