"""One stage: a served model and labelled rows in, standard scores out.

Knows nothing of how the model is served: every prediction is the answer to a request, so that what is scored is what
a user gets. Only bits per byte, which no answer shows, are read from the exported graph itself.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer
from tqdm import tqdm

from models.manifest import Confidence, Manifest, Score
from models.processor import keep_products_exact
from models.sentences import split_sentences
from training import scorers
from training.data import clean, read_set
from training.errors import TrainingError
from training.formats import Row
from training.knowledge import Ask, fill_base, fit, knowledge_scores
from training.recipe import EvaluateRecipe, HeldOut, Recipe
from training.tasks import TASKS
from training.tokenizer import EOS, token_id
from training.train import confidence_passages, held_out_passages

REQUEST_TEXTS = 16
PROMPT_WORDS = 32
"""Of a text that is to be continued where only the cost of that is asked."""
BASELINE = " of lead-3"
"""How the metric of a baseline ends, which scores the data and not the model."""
Query = Mapping[str, Any]
"""The texts of one query, by the fields of a request."""


@dataclass
class Evaluation:
    """Scores of one model on one data set, and what its answers cost."""

    scores: list[Score]
    queries: int = 0
    joules: float | None = 0.0
    """None as soon as one answer has no figure."""
    quality: str = "unavailable"


@dataclass
class _Client:
    """Asks in batches and adds up the bills."""

    ask: Ask
    task: str
    model: str
    setting: dict[str, Any]
    language: str = "und"
    """Of what it writes."""
    queries: int = 0
    joules: float | None = 0.0
    quality: str = "unavailable"

    def results(self, knowledge_base: str | None = None, **columns: Sequence[Any]) -> Iterator[dict[str, Any]]:
        """One result per row of the equally long ``columns``."""
        size = len(next(iter(columns.values())))
        setting = self.setting if knowledge_base is None else {**self.setting, "knowledge_base": knowledge_base}
        with tqdm(total=size, desc=f"asking {self.model}", unit="query", mininterval=1.0, delay=1.0) as bar:
            for start in range(0, size, REQUEST_TEXTS):
                part = {name: list(values[start : start + REQUEST_TEXTS]) for name, values in columns.items()}
                answer = self.ask(self.task, {"model": self.model, "truncate": True, **setting, **part})
                energy = answer["energy"]
                self.quality = energy["quality"]
                self.joules = None if None in (self.joules, energy["active_j"]) else self.joules + energy["active_j"]
                self.queries += len(answer["results"])
                bar.update(len(answer["results"]))
                yield from answer["results"]


def evaluate(
    ask: Ask,
    manifest: Manifest,
    folder: Path,
    recipe: Recipe,
    each: EvaluateRecipe,
    data: Path,
    limit: int | None,
) -> Evaluation:
    """Score ``manifest``'s model on one set of ``recipe.evaluate``, on its first ``limit`` rows or all.

    ``folder`` is the exported model. Raises ``TrainingError`` where the data does not fit the task.
    """
    every, rows = _rows(recipe, each, data)
    said = ", ".join(f"{name} {value}" for name, value in each.setting.items())
    client = _Client(ask, recipe.served_task, manifest.name, dict(each.setting), manifest.languages[-1])
    if each.knowledge_base:
        fitted_on = _held_out(recipe, data, confidence_passages)
        rows = list(islice((row for row in rows if row["context"] not in fitted_on), limit))
        base = fill_base(ask, each.path, every)
        abstains = client.setting.get("abstain", True)
        client.setting["abstain"] = False
        values = knowledge_scores(ask, client.results, rows, base, manifest.confidence if abstains else None)
        said = ", ".join(filter(None, (f"base of {len(base.ids):,} passages", said)))
    else:
        rows = list(islice(rows, limit))
        values = _SCORES[recipe.served_task](client, rows, folder)
    scores = [
        Score(data=each.path, split=each.split, metric=name, value=round(value, 3), rows=len(rows), setting=said)
        for name, value in values.items()
    ]
    return Evaluation(scores, client.queries, client.joules if client.queries else None, client.quality)


def asked(recipe: Recipe, each: EvaluateRecipe, data: Path) -> list[Query]:
    """What a query asks for each row of one set of ``recipe.evaluate``, besides the setting."""
    return [query for row in _rows(recipe, each, data)[1] if (query := _ASKED[recipe.served_task](row))]


def cost(ask: Ask, task: str, model: str, setting: Mapping[str, Any], queries: Sequence[Query]) -> Evaluation:
    """What it costs to answer ``queries``, equal in their fields, whatever the answers are; texts are continued
    greedily, so that they are as long each time."""
    client = _Client(ask, task, model, {"temperature": 0, **setting} if task == "generate" else dict(setting))
    deque(client.results(None, **{name: [query[name] for query in queries] for name in queries[0]}), maxlen=0)
    return Evaluation([], client.queries, client.joules, client.quality)


def fit_confidence(ask: Ask, manifest: Manifest, recipe: Recipe, data: Path, limit: int | None) -> Confidence:
    """Fit the confidence of answers from a knowledge base, on the passages that the recipe keeps for it.

    The model served must have the ``NEUTRAL`` confidence. Raises ``TrainingError`` where the recipe keeps none.
    """
    fitted_on = _held_out(recipe, data, confidence_passages)
    if recipe.held_out is None or not fitted_on:
        raise TrainingError(f"{recipe.name}: fitting confidence needs [held_out] with a confidence_share")
    part = next(part for part in recipe.data if part.path == recipe.held_out.path)
    every = list(read_set(data, part, TASKS[recipe.served_task].fields))
    base = fill_base(ask, part.path, every)
    rows = list(islice((row for row in every if row["context"] in fitted_on), limit))
    client = _Client(ask, recipe.served_task, manifest.name, {"abstain": False})
    return fit(client.results, rows, base, f"{part.path} {part.split}")


def _rows(recipe: Recipe, each: EvaluateRecipe, data: Path) -> tuple[list[Row], list[Row]]:
    """Every row of a set, and those that the recipe asks about."""
    every = list(read_set(data, each, TASKS[recipe.served_task].fields))
    return every, _unseen(recipe, data, every) if each.unseen_only else every


def _unseen(recipe: Recipe, data: Path, rows: list[Row]) -> list[Row]:
    """The rows whose passage the recipe keeps out of training."""
    if recipe.held_out is None:
        raise TrainingError(f"{recipe.name}: unseen_only needs [held_out]")
    passages = _held_out(recipe, data, held_out_passages)
    return [row for row in rows if row["context"] in passages]


def _held_out(recipe: Recipe, data: Path, which: Callable[[HeldOut, list[Row]], set[str]]) -> set[str]:
    """Which passages of the set that the recipe divides; none where it divides none."""
    if recipe.held_out is None:
        return set()
    part = next(part for part in recipe.data if part.path == recipe.held_out.path)
    return which(recipe.held_out, list(read_set(data, part, (("context",),))))


def _sentiment(client: _Client, rows: list[Row], folder: Path) -> dict[str, float]:
    results = list(client.results(input=[row["text"] for row in rows]))
    references = [row["label"] for row in rows]
    known = set(references)
    # A set without neutral texts asks which of its own labels is the likelier.
    predictions = [max(known, key=lambda label: result["scores"][label]) for result in results]
    if len(known) == 2:
        return {"accuracy": scorers.accuracy(predictions, references)}
    return {"macro recall": scorers.macro_recall(predictions, references)}


def _answer(client: _Client, rows: list[Row], folder: Path) -> dict[str, float]:
    results = list(
        client.results(question=[row["question"] for row in rows], context=[row["context"] for row in rows])
    )
    answers = [[answer["text"] for answer in row["answers"]] for row in rows]
    scores = scorers.squad([result["answer"] for result in results], answers)
    if all(answers) or not any(answers):
        return scores
    # How well questions without an answer are told from the others, at whatever threshold.
    sure = [1 - result["score"] if result["abstained"] else result["score"] for result in results]
    answerable, unanswerable = (
        [s for s, a in zip(sure, answers, strict=True) if bool(a) == has] for has in (True, False)
    )
    return {**scores, "no-answer AUC": scorers.auc(answerable, unanswerable)}


def _translate(client: _Client, rows: list[Row], folder: Path) -> dict[str, float]:
    texts = [result["text"] for result in client.results(input=[row["source"] for row in rows])]
    return {"sacreBLEU": scorers.bleu(texts, [row["target"] for row in rows], client.language)}


def _summarize(client: _Client, rows: list[Row], folder: Path) -> dict[str, float]:
    documents = [clean(row["document"]) for row in rows]
    references = [row.get("references") or [row["summary"]] for row in rows]
    found = scorers.rouge([result["text"] for result in client.results(input=documents)], references)
    lead = scorers.rouge([lead_3(document) for document in documents], references)
    return {**found, **{name + BASELINE: value for name, value in lead.items()}}


def lead_3(document: str) -> str:
    """The first three sentences: the baseline that a summary has to beat."""
    return " ".join(document[start:end] for start, end in split_sentences(document)[:3])


def _generate(client: _Client, rows: list[Row], folder: Path) -> dict[str, float]:
    text = "\n".join(row["text"] for row in rows)
    return {"bits per byte": scorers.bits_per_byte(negative_log_likelihood(folder, text), text)}


def _prompt(row: Row) -> Query | None:
    """The first words of a text to continue; None for one that has fewer, a headline for instance."""
    words = row["text"].split()
    return {"input": " ".join(words[:PROMPT_WORDS])} if len(words) >= PROMPT_WORDS else None


_SCORES = {
    "sentiment": _sentiment,
    "answer": _answer,
    "translate": _translate,
    "summarize": _summarize,
    "generate": _generate,
}


_ASKED: dict[str, Callable[[Row], Query | None]] = {
    "sentiment": lambda row: {"input": row["text"]},
    "answer": lambda row: {"question": row["question"], "context": row["context"]},
    "translate": lambda row: {"input": row["source"]},
    "summarize": lambda row: {"input": clean(row["document"])},
    "generate": _prompt,
}


def negative_log_likelihood(folder: Path, text: str, block: int = 256, rows: int = 64) -> float:
    """Total negative log-likelihood of ``text`` in nats under the decoder in ``folder``.

    The text is read in blocks of ``block`` tokens, each on its own after an end-of-text token, so the figure is an
    upper bound of what a sliding context gives. Token by token, as the service decodes.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    keep_products_exact(options)
    session = ort.InferenceSession(str(folder / "decoder.onnx"), options, providers=["CPUExecutionProvider"])
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    blocks = [ids[start : start + block] for start in range(0, len(ids), block)]
    first = token_id(tokenizer, EOS)
    caches = {each.name: each.shape for each in session.get_inputs() if each.name.startswith(("k_", "v_"))}
    total = 0.0
    for start in tqdm(range(0, len(blocks), rows), desc="reading", unit="batch", mininterval=1.0):
        total += _block_loss(session, caches, first, blocks[start : start + rows])
    return total


def _block_loss(
    session: ort.InferenceSession, caches: Mapping[str, list[Any]], first: int, blocks: Sequence[Sequence[int]]
) -> float:
    """Negative log-likelihood of the ``blocks``, side by side and token by token, each after the token ``first``."""
    n, size = len(blocks), max(map(len, blocks))
    tokens = np.full((n, size + 1), first, dtype=np.int64)
    for row, block in enumerate(blocks):
        tokens[row, 1 : 1 + len(block)] = block
    real = np.arange(size) < np.array([[len(block)] for block in blocks])
    binding = session.io_binding()
    for name, (_, heads, _, head_size) in caches.items():
        buffer = ort.OrtValue.ortvalue_from_numpy(np.zeros((n, heads, size, head_size), dtype=np.float32))
        binding.bind_ortvalue_input(name, buffer)
        binding.bind_ortvalue_output(f"new_{name}", buffer)
    binding.bind_output("logits")
    binding.bind_cpu_input("lengths", np.ones(n, dtype=np.int64))
    total = 0.0
    for position in range(size):
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[:, position : position + 1]))
        binding.bind_cpu_input("positions", np.full(n, position, dtype=np.int64))
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy().astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(n), tokens[:, position + 1]]
        total += float(losses[real[:, position]].sum())
    return total
