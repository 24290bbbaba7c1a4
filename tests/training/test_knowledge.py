"""Retrieval, answers and confidence are scored as their definitions say; a fit finds the curve that made the data."""

import math

import numpy as np
import pytest

from tests.training import recipes
from tests.training.conftest import write_set
from training.errors import TrainingError
from training.evaluate import evaluate, fit_confidence
from training.knowledge import NEUTRAL
from training.recipe import EvaluateRecipe
from training.scorers import best_threshold, calibration_error, fit_platt
from training.search_speed import search_speed


class Base:
    """A knowledge base that finds what its table says, and answers with the confidence given for each question."""

    def __init__(self, ranks, confidences):
        self.ranks, self.confidences, self.documents, self.asked = ranks, confidences, {}, []

    def __call__(self, path, body):
        if path.endswith("/documents"):
            self.base = path.split("/")[1]
            self.documents |= {document["id"]: document["text"] for document in body}
            return {}
        self.asked.append((path, body))
        if path.startswith("knowledge/"):
            others = [{"document": "none", "start": 0, "end": 999}] * (self.ranks[body["query"]] - 1)
            own = next(i for i, text in self.documents.items() if text.split()[0] == body["query"].split()[0])
            return {"passages": [*others, {"document": own, "start": 0, "end": 12}][: body.get("passages")]}
        results = [{"answer": "blue", "confidence": self.confidences[each]} for each in body["question"]]
        return {"results": results, "energy": {"active_j": 1.0, "quality": "estimated"}}


def row(name, answer, start=10):
    answers = [{"text": answer, "start": start}] if answer else []
    return {"context": f"{name} ".ljust(start, ".") + answer, "question": f"{name}?", "answers": answers}


ROWS = [row("A", "red", 2), row("B", "blue", 3), row("C", "blue", 40), row("D", "")]
RECIPE = recipes.answer(
    data=[{"path": "qa/colours", "licence": "CC0", "where": "made by this test"}],
    held_out={"path": "qa/colours", "passages_share": 0.99, "confidence_share": 0.0},
)


@pytest.fixture
def colours(tmp_path):
    write_set(tmp_path, "qa/colours", [{**each, "question": each["context"][0]} for each in ROWS], "train")
    return tmp_path


def manifest(least):
    confidence = NEUTRAL.model_copy(update={"least": least})
    return type("M", (), {"name": "tiny", "languages": ("en",), "confidence": confidence})()


def test_recall_wants_the_whole_answer_of_the_right_document(colours):
    ranks = {"A": 1, "B": 5, "C": 1, "D": 1}
    base = Base(ranks, dict.fromkeys("ABCD", 0.5))
    each = EvaluateRecipe(path="qa/colours", split="train", knowledge_base=True, setting={"abstain": False})
    found = evaluate(base, manifest(0.0), None, RECIPE, each, colours, None)
    values = {score.metric: score.value for score in found.scores}
    # The answer to C lies behind the end of its passage.
    assert [values[f"recall@{depth}"] for depth in (1, 5, 20)] == pytest.approx([100 / 3, 200 / 3, 200 / 3], abs=1e-3)
    assert values["EM"] == 50.0
    assert "ECE" not in values
    # A base of the set's own: no other set's passages are found in it.
    assert base.base == "qa-colours"
    assert {body.get("knowledge_base", "qa-colours") for _, body in base.asked} == {"qa-colours"}
    assert found.scores[0].setting == "base of 4 passages, abstain False"


def test_withheld_answers_are_scored_as_the_service_withholds_them(colours):
    base = Base(dict.fromkeys("ABCD", 1), {"A": 0.1, "B": 0.9, "C": 0.7, "D": 0.2})
    each = EvaluateRecipe(path="qa/colours", split="train", knowledge_base=True)
    found = evaluate(base, manifest(0.3), None, RECIPE, each, colours, None)
    values = {score.metric: score.value for score in found.scores}
    assert values["EM"] == 75.0  # B, C, and D for its silence
    assert (values["abstained, answerable"], values["abstained, unanswerable"]) == (pytest.approx(33.333), 100.0)
    assert values["ECE"] == pytest.approx(100 * (0.1 + 0.1 + 0.3 + 0.2) / 4)
    assert all(body["abstain"] is False for path, body in base.asked if path == "answer")


def test_confidence_is_fitted_on_passages_of_its_own(tmp_path):
    rng = np.random.default_rng(0)
    rows, confidences = [], {}
    for number in range(4000):
        score = rng.normal(10, 3)
        right = rng.random() < 1 / (1 + math.exp(-(0.6 * score - 6)))
        rows.append(row(f"Q{number}", "blue" if right else ""))
        confidences[f"Q{number}?"] = NEUTRAL.of(score)
    write_set(tmp_path, "qa/colours", rows, "train")
    held_out = {"path": "qa/colours", "passages_share": 0.8, "confidence_share": 0.5}
    recipe = RECIPE.model_copy(update={"held_out": RECIPE.held_out.model_validate(held_out)})
    base = Base({}, confidences)
    fitted = fit_confidence(base, manifest(0.0), recipe, tmp_path, None)
    assert (fitted.slope, fitted.intercept) == (pytest.approx(0.6, abs=0.08), pytest.approx(-6, abs=0.8))
    assert (fitted.rows, fitted.data, len(base.documents)) == (1600, "qa/colours train", 4000)
    # Where wrong and right are as likely as a half each, Youden's threshold is near their share.
    assert 0.3 < fitted.least < 0.7
    with pytest.raises(TrainingError, match="confidence_share"):
        fit_confidence(base, manifest(0.0), RECIPE, tmp_path, None)


def test_calibration_error_is_the_gap_in_every_bin():
    assert calibration_error([0.1] * 10 + [0.9] * 10, [0.0] * 9 + [1.0] + [1.0] * 9 + [0.0], bins=2) == pytest.approx(
        0
    )
    assert calibration_error([0.8] * 4, [1.0, 0.0, 0.0, 1.0], bins=1) == pytest.approx(30)


def test_a_perfect_separation_has_a_finite_curve():
    slope, intercept = fit_platt([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 1.0])
    assert 0 < slope < 100 and -1000 < intercept < 0


def test_the_threshold_separates_as_well_as_can_be():
    assert best_threshold([0.1, 0.2, 0.3, 0.8, 0.9], [False, False, True, True, True]) == 0.3
    assert best_threshold([0.4, 0.1, 0.9], [False, False, True]) == 0.9


def test_searches_are_timed_among_recombined_passages():
    rows = [row(f"Q{number} is a name.", "blue") for number in range(30)]
    base = Base({each["question"]: 1 for each in rows}, {})
    found = search_speed(base, rows, passages=1500)
    assert (found.passages, len(base.documents)) == (1500, 1500)
    assert 0 < found.median_ms <= found.p95_ms
    assert len({text for text in base.documents.values()}) > 1000
