"""A study of few-shot adaptation: heads on a trunk as it is, fine-tuning, and trunks that have learnt to adapt.

Prototypical networks (Snell et al. 2017) and first-order Reptile (Nichol et al. 2018) are trained on episodes of some
problems; everything is then measured on problems that no trunk was trained on. Knows nothing of the service.
"""

import copy
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

from models.config import TransformerConfig
from models.heads import Floats, features_of, fit
from models.transformer import Transformer
from training.data import clean, read_set
from training.errors import TrainingError, complaints
from training.loop import precision_on
from training.recipe import SetRecipe, TrunkRecipe
from training.tasks import Sample as TaskSample
from training.tasks import collate
from training.tokenizer import PAD_ID
from training.trunk import find_trunk, load_trunk, trunk_tokenizer

STUDY = Path(__file__).with_name("few-shot.toml")
_TITLE = re.compile(r"\s*# Title: (.+)")
_SCALE = 10.0
"""Of squared distances between features of length 1, as logits."""
Random = np.random.Generator


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ProblemRecipe(SetRecipe):
    """Texts to be told apart, and by what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    held_out: bool
    """Whether it is measured on; all others are trained on."""
    by: Literal["label", "title"] = "label"
    """A field of the rows, or the book whose title a row has told last: then a paragraph is a text."""
    part: Literal["all", "even", "odd"] = "all"
    """Which of the labels, counted in alphabetical order: one set can serve on both sides and share none."""
    max_texts: int = 100
    """Of each label, the first."""


class MetaRecipe(_Part):
    """How the trunks that learn to adapt are trained."""

    episodes: int
    examples: int = 16
    queries: int = 16
    steps: int = 4
    """Inner steps of Reptile."""
    prototypical_rate: float = 2e-5
    reptile_rate: float = 0.5
    """How far the first outer step goes towards the adapted weights; falls linearly to zero."""


class AdaptRecipe(_Part):
    """How a trunk is fine-tuned, also inside Reptile."""

    steps: int = 15
    batch: int = 8
    trunk_rate: float = 1e-4
    head_rate: float = 1e-2


class Study(_Part):
    """What is compared, on what."""

    trunk: TrunkRecipe
    model: TransformerConfig
    seed: int = 0
    max_tokens: int
    labels: int = Field(ge=2)
    """Most labels of an episode; where a problem has more, each draw takes some."""
    examples: tuple[int, ...] = (8, 16, 32, 64)
    queries: int = 60
    draws: int
    """Of every problem and number of examples, for heads."""
    fine_tuned_draws: int
    """The first of those, for fine-tuning."""
    meta: MetaRecipe
    adapt: AdaptRecipe = AdaptRecipe()
    problems: tuple[ProblemRecipe, ...]

    @model_validator(mode="after")
    def _both_sides(self) -> Self:
        if {each.held_out for each in self.problems} != {True, False}:
            raise ValueError("problems: some must be held out, and some not")
        return self


Ids = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Texts as ids, by label; no text has two labels."""

    name: str
    texts: Mapping[str, Sequence[Ids]]


@dataclass(frozen=True)
class Episode:
    """A problem in small: examples to learn from, and other texts to be asked."""

    examples: Sequence[tuple[Ids, int]]
    queries: Sequence[tuple[Ids, int]]
    n_labels: int


@dataclass(frozen=True)
class Outcome:
    """Accuracies of one way to adapt, in percent, one for each draw."""

    method: str
    problem: str
    examples: int
    accuracies: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the draws."""
        return float(np.mean(self.accuracies))

    @property
    def interval(self) -> float:
        """Half of the 95% confidence interval of the mean (normal); NaN of a single draw."""
        n = len(self.accuracies)
        return math.nan if n < 2 else 1.96 * float(np.std(self.accuracies, ddof=1)) / math.sqrt(n)


def load_study(name: str) -> Study:
    """Read a study by path, or the shipped one, ``few-shot``. Raises ``TrainingError`` naming file and field."""
    path = STUDY if name == STUDY.stem else Path(name)
    try:
        return Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path}: {error}") from error
    except ValidationError as error:
        raise TrainingError(f"{path}: {complaints(error)}") from error


def read_problems(study: Study, data: Path, tokenizer: Tokenizer) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on, and those held out, without any text that is on both sides.

    Raises ``TrainingError`` for one that has too few texts for a draw.
    """
    held_out = [_read(each, study, data, tokenizer) for each in study.problems if each.held_out]
    secret = {text for problem in held_out for texts in problem.texts.values() for text in texts}
    trained_on = []
    for each in study.problems:
        if not each.held_out:
            problem = _read(each, study, data, tokenizer)
            texts = {label: [text for text in those if text not in secret] for label, those in problem.texts.items()}
            trained_on.append(Problem(problem.name, texts))
    return trained_on, held_out


def _read(part: ProblemRecipe, study: Study, data: Path, tokenizer: Tokenizer) -> Problem:
    found: dict[str, dict[Ids, None]] = {}
    for text, label in _labelled(part, data):
        if len(found.setdefault(label, {})) < part.max_texts:
            ids = tokenizer.encode(clean(text)).ids
            # A text that is cut keeps its last token, [SEP].
            found[label].setdefault((*ids[:-1][: study.max_tokens - 1], ids[-1]))
    labels = sorted(found)[{"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[part.part]]
    labels_of = Counter(text for label in labels for text in found[label])
    texts = {label: [text for text in found[label] if labels_of[text] == 1] for label in labels}
    n = max(max(study.examples), study.meta.examples)
    least = -(-n // min(study.labels, max(len(labels), 1))) + 1
    texts = {label: those for label, those in texts.items() if len(those) > least}
    if len(texts) < 2:
        raise TrainingError(f"{part.path}: two labels with more than {least} texts are needed, for draws of {n}")
    return Problem(part.name, texts)


def _labelled(part: ProblemRecipe, data: Path) -> Iterator[tuple[str, str]]:
    if part.by == "label":
        for row in read_set(data, part, [["text", "label"]]):
            yield row["text"], row["label"]
        return
    title = None
    for row in read_set(data, part, [["text"]]):
        if found := _TITLE.match(row["text"]):
            title = found[1].strip()
        for paragraph in row["text"].split("\n\n"):
            # Neither headings nor single lines of dialogue.
            if title is not None and len(paragraph) > 150 and not paragraph.startswith("#"):
                yield paragraph, title


def draw_episode(problem: Problem, n_labels: int, examples: int, queries: int, random: Random) -> Episode:
    """``examples`` texts, spread over the labels as evenly as they go, and up to ``queries`` others likewise."""
    chosen = random.permutation(sorted(problem.texts))[:n_labels].tolist()
    orders = [random.permutation(len(problem.texts[label])).tolist() for label in chosen]
    drawn: list[tuple[Ids, int]] = []
    while any(orders) and len(drawn) < examples + queries:
        for number, order in enumerate(orders):
            if order and len(drawn) < examples + queries:
                drawn.append((problem.texts[chosen[number]][order.pop()], number))
    return Episode(drawn[:examples], drawn[examples:], len(chosen))


def vectors(model: Transformer, texts: Sequence[Ids]) -> Tensor:
    """The texts' vectors ``(n, l * d)``, in one batch."""
    batch = collate([TaskSample(list(ids)) for ids in texts], PAD_ID)
    # bfloat16 where the processor multiplies it: one that only imitates it is many times slower with it.
    precise = precision_on(torch.device("cpu"), "auto") == "float32"
    with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
        found = model.vectors(batch["ids"], batch["lengths"])
    return found.float()


@torch.no_grad()
def features(model: Transformer, texts: Sequence[Ids]) -> Floats:
    """What heads are fitted on, ``(n, l * d)``; texts of one length go through the trunk together."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    parts = [vectors(model, [texts[place] for place in order[at : at + 32]]) for at in range(0, len(order), 32)]
    found = np.empty((len(texts), parts[0].size(1)), np.float32)
    found[order] = torch.cat(parts).numpy()
    return features_of(found, model.config.d_model)


def prototype_logits(examples: Tensor, labels: Tensor, queries: Tensor, n_labels: int) -> Tensor:
    """Minus the squared distances of ``queries`` ``(m, f)`` to the mean of each label's ``examples`` ``(n, f)``."""
    members = F.one_hot(labels, n_labels).to(examples.dtype)
    prototypes = (members.T @ examples) / members.sum(0)[:, None]
    return -_SCALE * torch.cdist(queries, prototypes).square()


def reptile_step(weights: Mapping[str, Tensor], adapted: Mapping[str, Tensor], rate: float) -> None:
    """``weights += rate * (adapted - weights)``, in place (Nichol et al. 2018, equation of algorithm 1)."""
    for name, weight in weights.items():
        weight.lerp_(adapted[name], rate)


def adapt(model: Transformer, episode: Episode, how: AdaptRecipe, random: Random) -> nn.Linear:
    """Fine-tune ``model`` in place on an episode's examples, with a new head on the last layer's mean; returns it.

    Embeddings stay as they are: a few examples hold a few words.
    """
    head = nn.Linear(model.config.d_model, episode.n_labels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [
        {"params": list(model.encoder.parameters()), "lr": how.trunk_rate},
        {"params": list(head.parameters()), "lr": how.head_rate},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    model.embed.requires_grad_(False)
    model.train()
    n = len(episode.examples)
    order: list[int] = []
    for _ in range(how.steps):
        while len(order) < min(how.batch, n):
            order += random.permutation(n).tolist()
        batch = [episode.examples[place] for place in order[: how.batch]]
        order = order[how.batch :]
        logits = head(_last_layer(model, [ids for ids, _ in batch]))
        F.cross_entropy(logits, torch.tensor([label for _, label in batch])).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return head


def _last_layer(model: Transformer, texts: Sequence[Ids]) -> Tensor:
    return vectors(model, texts)[:, -model.config.d_model :]


def train_prototypical(model: Transformer, problems: Sequence[Problem], study: Study) -> None:
    """Let ``model`` learn vectors whose means tell queries apart (Snell et al. 2017), in place."""
    optimiser = torch.optim.AdamW(model.encoder.parameters(), lr=study.meta.prototypical_rate, fused=True)
    model.embed.requires_grad_(False)
    model.train()
    for episode in _episodes("prototypical", problems, study):
        texts = [ids for ids, _ in (*episode.examples, *episode.queries)]
        labels = torch.tensor([label for _, label in (*episode.examples, *episode.queries)])
        parts = vectors(model, texts).view(len(texts), -1, model.config.d_model)
        found = (F.normalize(parts, dim=-1) / math.sqrt(parts.size(1))).flatten(1)
        n = len(episode.examples)
        logits = prototype_logits(found[:n], labels[:n], found[n:], episode.n_labels)
        F.cross_entropy(logits, labels[n:]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def train_reptile(model: Transformer, problems: Sequence[Problem], study: Study) -> None:
    """Move ``model`` towards where a few steps on each episode lead, in place (first-order Reptile)."""
    random = np.random.default_rng(study.seed)
    weights = dict(model.encoder.named_parameters())
    how = study.adapt.model_copy(update={"steps": study.meta.steps})
    for number, episode in enumerate(_episodes("Reptile", problems, study)):
        adapted = copy.deepcopy(model)
        adapt(adapted, episode, how, random)
        rate = study.meta.reptile_rate * (1 - number / study.meta.episodes)
        with torch.no_grad():
            reptile_step(weights, dict(adapted.encoder.named_parameters()), rate)


def _episodes(name: str, problems: Sequence[Problem], study: Study) -> Iterator[Episode]:
    random = np.random.default_rng(study.seed)
    for _ in tqdm(range(study.meta.episodes), desc=name, unit="episode", mininterval=1.0):
        problem = problems[int(random.integers(len(problems)))]
        yield draw_episode(problem, study.labels, study.meta.examples, study.meta.queries, random)


def head_accuracy(
    embedded: Mapping[Ids, NDArray[np.float64]], episode: Episode, kind: Literal["mean", "ridge"]
) -> float:
    """In percent, of a head on vectors that stay as they are."""
    (examples, labels), (queries, wanted) = (_split(part, embedded) for part in (episode.examples, episode.queries))
    if kind == "ridge":
        scores = fit(examples, labels, episode.n_labels)[0].probabilities(queries)
    else:
        known, numbers, asked = (torch.from_numpy(each) for each in (examples, labels, queries))
        scores = prototype_logits(known, numbers, asked, episode.n_labels).numpy()
    return 100 * float((scores.argmax(1) == wanted).mean())


def _split(
    part: Sequence[tuple[Ids, int]], embedded: Mapping[Ids, NDArray[np.float64]]
) -> tuple[Floats, NDArray[np.int64]]:
    return np.stack([embedded[ids] for ids, _ in part]), np.array([label for _, label in part])


def fine_tuned_accuracy(trunk: Transformer, episode: Episode, how: AdaptRecipe, random: Random) -> float:
    """In percent; ``trunk`` stays as it is."""
    model = copy.deepcopy(trunk)
    head = adapt(model, episode, how, random)
    model.eval()
    with torch.no_grad():
        logits = head(_last_layer(model, [ids for ids, _ in episode.queries]))
    wanted = torch.tensor([label for _, label in episode.queries])
    return 100 * float((logits.argmax(1) == wanted).float().mean())


def run_study(study: Study, data: Path) -> list[Outcome]:
    """Train and measure everything."""
    folder = find_trunk(study.trunk)
    tokenizer = trunk_tokenizer(folder)
    trained_on, held_out = read_problems(study, data, tokenizer)
    torch.manual_seed(study.seed)
    trunk = Transformer(study.model)
    load_trunk(trunk, folder, np.arange(study.model.vocab_size))
    prototypical, reptile = copy.deepcopy(trunk), copy.deepcopy(trunk)
    train_prototypical(prototypical, trained_on, study)
    train_reptile(reptile, trained_on, study)
    outcomes = []
    for name, model in (("the trunk", trunk), ("prototypical episodes", prototypical), ("Reptile", reptile)):
        for problem in held_out:
            outcomes += list(_head_outcomes(name, model, problem, study))
            if model is not prototypical:
                outcomes += list(_fine_tuned_outcomes(name, model, problem, study))
    return outcomes


def _head_outcomes(name: str, model: Transformer, problem: Problem, study: Study) -> Iterator[Outcome]:
    drawn = {n: _drawn(problem, n, study.draws, study) for n in study.examples}
    used = {ids for each in drawn.values() for episode in each for ids, _ in (*episode.examples, *episode.queries)}
    texts = sorted(used)
    embedded = dict(zip(texts, features(model, texts), strict=True))
    kinds: tuple[tuple[str, Literal["mean", "ridge"]], ...] = (("prototypes", "mean"), ("ridge", "ridge"))
    for label, kind in kinds:
        for n, episodes in drawn.items():
            accuracies = [head_accuracy(embedded, episode, kind) for episode in episodes]
            yield Outcome(f"{label} on {name}", problem.name, n, accuracies)


def _fine_tuned_outcomes(name: str, model: Transformer, problem: Problem, study: Study) -> Iterator[Outcome]:
    for n in tqdm(study.examples, desc=f"fine-tuning {name} on {problem.name}", mininterval=1.0):
        random = np.random.default_rng(study.seed)
        episodes = _drawn(problem, n, study.fine_tuned_draws, study)
        accuracies = [fine_tuned_accuracy(model, episode, study.adapt, random) for episode in episodes]
        yield Outcome(f"fine-tuning of {name}", problem.name, n, accuracies)


def _drawn(problem: Problem, n: int, draws: int, study: Study) -> list[Episode]:
    """The same draws for every way to adapt."""
    seeds = [(study.seed, draw) for draw in range(draws)]
    return [draw_episode(problem, study.labels, n, study.queries, np.random.default_rng(seed)) for seed in seeds]


def table(outcomes: Sequence[Outcome]) -> str:
    """Rows of methods, columns of numbers of examples, a block for each problem."""
    lines = []
    sizes = sorted({each.examples for each in outcomes})
    width = max(len(each.method) for each in outcomes)
    for problem in dict.fromkeys(each.problem for each in outcomes):
        lines.append(f"{problem}: accuracy in %, with its 95% interval, at {', '.join(map(str, sizes))} examples")
        for method in dict.fromkeys(each.method for each in outcomes):
            row = {each.examples: each for each in outcomes if (each.method, each.problem) == (method, problem)}
            cells = "  ".join(f"{row[n].mean:5.1f} ±{row[n].interval:4.1f}" for n in sizes if n in row)
            draws = len(next(iter(row.values())).accuracies)
            lines.append(f"  {method:{width}}  {cells}  ({draws} draws)")
    return "\n".join(lines)
