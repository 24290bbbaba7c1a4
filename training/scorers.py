"""Standard scores of predictions against references. Knows nothing of models; strings and labels in, percentages out.

Where a field's own implementation exists (sacreBLEU, rouge-score) it is used, so that figures compare with papers'.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer


def macro_recall(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over the reference labels of the share found, in percent (TweetEval's score for sentiment)."""
    found: Counter[str] = Counter()
    total: Counter[str] = Counter(references)
    for prediction, reference in zip(predictions, references, strict=True):
        found[reference] += prediction == reference
    return 100 * sum(found[label] / count for label, count in total.items()) / len(total)


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of equal labels, in percent."""
    return 100 * sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Area under the ROC curve, in percent: in how many of all pairs the positive is the larger one, a tie counting
    half (Mann and Whitney 1947)."""
    below = np.sort(negatives)
    wins = np.searchsorted(below, positives, "left") + np.searchsorted(below, positives, "right")
    return 100 * float(wins.mean()) / (2 * len(below))


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (Rajpurkar et al. 2016, evaluate-v1.1)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction equals one of the answers; no answers means that none is right."""
    return float(normalise_answer(prediction) in {normalise_answer(answer) for answer in answers or [""]})


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 of the words in common with one of the answers (evaluate-v2.0 where there are none)."""
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(a).split()) for a in answers or [""])


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's exact match and F1, in percent."""
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "EM": 100 * sum(exact_match(p, a) for p, a in pairs) / len(pairs),
        "F1": 100 * sum(token_f1(p, a) for p, a in pairs) / len(pairs),
    }


def bleu(predictions: Sequence[str], references: Sequence[str], language: str = "und") -> float:
    """Corpus BLEU by sacreBLEU with its defaults (13a tokens, cased, exponential smoothing); texts in ``language`` zh,
    which puts no spaces between words, are compared character by character (its tokenizer zh)."""
    tokens = "zh" if language.split("-")[0] == "zh" else "13a"
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)], tokenize=tokens).score)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 with stemming, the mean over documents of the best reference, in percent."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    sums: dict[str, float] = defaultdict(float)
    for prediction, targets in zip(predictions, references, strict=True):
        for name, score in scorer.score_multi(list(targets), prediction).items():
            sums[name] += score.fmeasure
    return {
        label: 100 * sums[name] / len(predictions)
        for name, label in (("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"), ("rougeL", "ROUGE-L"))
    }


def bits_per_byte(negative_log_likelihood_nats: float, text: str) -> float:
    """Total negative log-likelihood over the text's UTF-8 bytes; comparable between tokenizers."""
    return negative_log_likelihood_nats / math.log(2) / len(text.encode())


def calibration_error(confidences: Sequence[float], right: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error in percent: the mean gap between confidence and share of right answers, over ``bins``
    equally filled ones (Guo et al. 2017; Nguyen and O'Connor 2015 for the bins)."""
    parts = np.array_split(np.argsort(confidences, kind="stable"), bins)
    said, was = np.asarray(confidences), np.asarray(right)
    gaps = [abs(said[part].mean() - was[part].mean()) * len(part) for part in parts if len(part)]
    return 100 * float(sum(gaps)) / len(said)


def fit_platt(scores: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the logistic curve that makes ``right`` likeliest (Platt 1999), by Newton's method."""
    features = np.stack([np.asarray(scores), np.ones(len(scores))], axis=1)
    weights = np.zeros(2)
    for _ in range(100):
        likely = 1 / (1 + np.exp(-features @ weights))
        # A thousandth keeps the step finite where the scores tell right from wrong perfectly.
        curvature = features.T @ (features * (likely * (1 - likely))[:, None]) + 1e-3 * np.eye(2)
        step = np.linalg.solve(curvature, features.T @ (np.asarray(right) - likely) - 1e-3 * weights)
        weights += step
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), float(weights[1])


def best_threshold(confidences: Sequence[float], answerable: Sequence[bool]) -> float:
    """The least confidence worth an answer: where the shares of answerable questions answered and of others not
    answered have the greatest sum (Youden 1950), whatever mix of the two users ask."""
    order = np.argsort(confidences, kind="stable")
    can = np.asarray(answerable)[order]
    # Of the answers below each candidate: questions that had one are lost, the others well withheld.
    lost, withheld = np.cumsum(can) / max(1, can.sum()), np.cumsum(~can) / max(1, (~can).sum())
    best = int(np.argmax(withheld - lost))
    return float(np.asarray(confidences)[order][min(best + 1, len(can) - 1)])
