"""Questions asked of a knowledge base: how well passages are found and read, and how far confidence can be trusted.

Knows nothing of how the service does either; all it has is the answers to requests.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from models.manifest import Confidence
from training import scorers
from training.formats import Row

Results = Callable[..., Any]
"""Asks in batches: ``results(question=[...], ...)`` gives one result of the task each."""
Ask = Callable[[str, Any], dict[str, Any]]
"""``ask(path, body)`` sends one request to ``/v1/<path>``, mostly a task, and returns the parsed answer: of several
lines the last. Documents are put, everything else is posted."""

DEPTHS = (1, 5, 20)
NEUTRAL = Confidence(slope=0.05, intercept=0.0, least=0.0, data="", rows=0)
"""Answers everything, with a confidence from which the score can be told."""


@dataclass(frozen=True)
class Base:
    """A knowledge base of all the passages of a data set."""

    name: str
    ids: Mapping[str, str]
    """The document of each passage."""


def fill_base(ask: Ask, path: str, rows: Sequence[Row]) -> Base:
    """Put every passage of ``rows``, those of the set ``path``, into a base of its own, each as a document."""
    name = re.sub(r"[^a-z0-9._-]", "-", path.lower())
    ids = {context: str(number) for number, context in enumerate(dict.fromkeys(row["context"] for row in rows))}
    ask(f"knowledge/{name}/documents", [{"id": number, "text": context} for context, number in ids.items()])
    return Base(name, ids)


def knowledge_scores(
    ask: Ask, results: Results, rows: Sequence[Row], base: Base, confidence: Confidence | None
) -> dict[str, float]:
    """Recall of the passage that holds the answer, EM and F1.

    With a ``confidence`` also its calibration error, and EM and F1 with the answers withheld that it finds too
    unlikely, as the service does where a request lets it; ``results`` must be asked not to.
    """
    scores = _recall(ask, [row for row in rows if row["answers"]], base)
    found = list(results(question=[row["question"] for row in rows], knowledge_base=base.name))
    answers = [[answer["text"] for answer in row["answers"]] for row in rows]
    predictions = [result["answer"] for result in found]
    if confidence is None:
        return scores | scorers.squad(predictions, answers)
    confidences = [result["confidence"] for result in found]
    withheld = [each < confidence.least for each in confidences]
    scores |= scorers.squad(["" if no else each for each, no in zip(predictions, withheld, strict=True)], answers)
    for kind, wanted in (("answerable", True), ("unanswerable", False)):
        part = [no for no, golds in zip(withheld, answers, strict=True) if bool(golds) is wanted]
        if part:
            scores[f"abstained, {kind}"] = 100 * sum(part) / len(part)
    scores["ECE"] = scorers.calibration_error(confidences, _right(predictions, answers))
    return scores


def fit(results: Results, rows: Sequence[Row], base: Base, data: str) -> Confidence:
    """Confidence and the least of it worth an answer, fitted on ``rows``, whose passages the base must hold.

    ``results`` comes from a model with the ``NEUTRAL`` confidence.
    """
    found = list(results(question=[row["question"] for row in rows], knowledge_base=base.name))
    answers = [[answer["text"] for answer in row["answers"]] for row in rows]
    # Where no passage was found there was nothing to score.
    read = [place for place, result in enumerate(found) if 0 < result["confidence"] < 1]
    scores = [math.log(found[i]["confidence"] / (1 - found[i]["confidence"])) / NEUTRAL.slope for i in read]
    right = _right([found[i]["answer"] for i in read], [answers[i] for i in read])
    slope, intercept = scorers.fit_platt(scores, right)
    fitted = Confidence(slope=slope, intercept=intercept, least=0.0, data=data, rows=len(read))
    confidences = [fitted.of(score) for score in scores]
    least = scorers.best_threshold(confidences, [bool(answers[i]) for i in read])
    return fitted.model_copy(update={"least": least})


def _right(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """1 where an answer was given and is one of the right ones; never where there is none."""
    return [scorers.exact_match(p, a) if a else 0.0 for p, a in zip(predictions, answers, strict=True)]


def _recall(ask: Ask, rows: Sequence[Row], base: Base) -> dict[str, float]:
    """Shares of questions with an answer's span whole among the first passages, in percent."""
    hits = dict.fromkeys(DEPTHS, 0)
    for row in tqdm(rows, desc="searching", unit="query", mininterval=1.0):
        found = ask(f"knowledge/{base.name}/search", {"query": row["question"], "passages": max(DEPTHS)})["passages"]
        rank = next((n for n, passage in enumerate(found, start=1) if _holds(passage, row, base)), None)
        for depth in DEPTHS:
            hits[depth] += rank is not None and rank <= depth
    return {f"recall@{depth}": 100 * count / max(1, len(rows)) for depth, count in hits.items()}


def _holds(passage: dict[str, Any], row: Row, base: Base) -> bool:
    return passage["document"] == base.ids[row["context"]] and any(
        passage["start"] <= answer["start"] and answer["start"] + len(answer["text"]) <= passage["end"]
        for answer in row["answers"]
    )
