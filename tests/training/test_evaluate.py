"""Scores of answers that are known, and bits per byte against PyTorch."""

import math

import numpy as np
import pytest
import torch

from tests.training import recipes
from tests.training.conftest import write_set
from training.errors import TrainingError
from training.evaluate import evaluate, lead_3, negative_log_likelihood
from training.export import export
from training.recipe import EvaluateRecipe
from training.train import train


class Server:
    """Answers from a table, one joule each, and remembers what it was asked."""

    def __init__(self, answers, column="input", joules=1.0):
        self.answers, self.column, self.joules, self.bodies = answers, column, joules, []

    def __call__(self, task, body):
        self.bodies.append((task, body))
        texts = body[self.column]
        active_j = None if self.joules is None else self.joules * len(texts)
        return {
            "results": [self.answers[text] for text in texts],
            "energy": {"active_j": active_j, "quality": "estimated"},
        }


@pytest.fixture(scope="module")
def translator(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("translator")
    recipe = recipes.translate()
    trained = train(recipe, data, root / "runs")
    return recipe, export(recipe, trained, data, root / "out"), root / "out" / recipe.name


def test_translations_are_scored_and_billed(data, translator):
    recipe, manifest, folder = translator
    server = Server({"one one": {"text": "eins eins"}, "one two": {"text": "eins zwei"}})
    each = EvaluateRecipe(path="translation/numbers", split="validation", setting={"beams": 2})
    found = evaluate(server, manifest, folder, recipe, each, data, limit=2)
    (score,) = found.scores
    assert (score.metric, score.rows, score.setting) == ("sacreBLEU", 2, "beams 2")
    assert (found.queries, found.joules, found.quality) == (2, 2.0, "estimated")
    (task, body) = server.bodies[0]
    assert (task, body["model"], body["beams"], body["truncate"]) == ("translate", "tiny-translate", 2, True)


def test_the_language_written_decides_how_translations_are_compared(tmp_path, translator):
    recipe, manifest, folder = translator
    answers = {"one one": {"text": "\u6211\u559c\u6b22\u5403\u82f9\u679c\u3002"}}
    each = EvaluateRecipe(path="translation/chinese")
    write_set(
        tmp_path,
        each.path,
        [{"source": "one one", "target": "\u6211\u4e5f\u559c\u6b22\u5403\u82f9\u679c\u3002"}],
        "validation",
    )
    values = [
        evaluate(
            Server(answers),
            manifest.model_copy(update={"languages": ("en", code)}),
            folder,
            recipe,
            each,
            tmp_path,
            None,
        )
        for code in ("de", "zh")
    ]
    assert [found.scores[0].value > 50 for found in values] == [False, True]


def test_one_answer_without_a_figure_leaves_the_sum_unknown(data, translator):
    recipe, manifest, folder = translator
    server = Server({"one one": {"text": "eins eins"}}, joules=None)
    each = EvaluateRecipe(path="translation/numbers", split="validation")
    assert evaluate(server, manifest, folder, recipe, each, data, limit=1).joules is None


@pytest.mark.parametrize(
    ("labels", "metric", "value"),
    [(["negative", "neutral", "positive"], "macro recall", 200 / 3), (["negative", "positive"], "accuracy", 100)],
)
def test_sentiment_asks_only_for_the_labels_of_the_set(tmp_path, translator, labels, metric, value):
    _, manifest, folder = translator
    write_set(tmp_path, "s", [{"text": label, "label": label} for label in labels], "validation")
    scores = {"negative": 0.3, "neutral": 0.1, "positive": 0.6}
    answers = {
        "negative": {"scores": {**scores, "negative": 0.7}},
        "neutral": {"scores": scores},
        "positive": {"scores": {**scores, "neutral": 0.55}},
    }
    each = EvaluateRecipe(path="s")
    (score,) = evaluate(Server(answers), manifest, folder, recipes.sentiment(), each, tmp_path, None).scores
    assert (score.metric, score.value) == (metric, pytest.approx(value, abs=1e-3))


def test_answers_are_scored_on_unseen_passages_only(data, translator):
    _, manifest, folder = translator
    recipe = recipes.answer(held_out={"path": "qa/rivers", "passages_share": 0.25})
    server = Server({"Where does it rise?": {"answer": "valley 7"}}, column="question")
    each = EvaluateRecipe(path="qa/rivers", split="train", unseen_only=True)
    found = evaluate(server, manifest, folder, recipe, each, data, None)
    assert {score.metric: score.value for score in found.scores} == {"EM": 50.0, "F1": 75.0}
    assert found.queries == 2
    with pytest.raises(TrainingError, match="needs \\[held_out\\]"):
        evaluate(server, manifest, folder, recipes.answer(), each, data, None)


def test_what_has_no_answer_is_told_from_the_rest(tmp_path, translator):
    _, manifest, folder = translator
    answers = {
        "Where?": {"answer": "here", "score": 0.7, "abstained": False},
        "When?": {"answer": "", "score": 0.4, "abstained": True},
        "Why?": {"answer": "", "score": 0.9, "abstained": True},
        "Who?": {"answer": "here", "score": 0.6, "abstained": False},
    }
    here = [{"text": "here", "start": 0}]
    known = {"Where?": here, "When?": here, "Why?": [], "Who?": []}
    rows = [{"question": q, "context": "here", "answers": a} for q, a in known.items()]
    write_set(tmp_path, "qa", rows, "validation")
    server = Server(answers, column="question")
    found = evaluate(server, manifest, folder, recipes.answer(), EvaluateRecipe(path="qa"), tmp_path, None)
    # Sure of an answer by 0.7 and 0.6 where there is one, by 0.1 and 0.6 where there is none.
    assert {score.metric: score.value for score in found.scores} == {"EM": 50, "F1": 50, "no-answer AUC": 87.5}


def test_summaries_are_scored_beside_lead_3(data, translator):
    _, manifest, folder = translator
    each = EvaluateRecipe(path="summarization/rain", split="train")

    class Summaries(dict):
        def __missing__(self, document):
            return {"text": "Rain on " + document.split(" on ")[1].split(".")[0] + "."}

    found = evaluate(Server(Summaries()), manifest, folder, recipes.summarize(), each, data, None)
    values = {score.metric: score.value for score in found.scores}
    assert values["ROUGE-1"] == pytest.approx(100)
    assert values["ROUGE-1 of lead-3"] < 60
    assert lead_3("One. Two! Three? Four.") == "One. Two! Three?"


def test_bits_per_byte_are_those_of_pytorch(tmp_path, data):
    recipe = recipes.generate(export={**recipes.generate().export.model_dump(), "scheme": "none"})
    trained = train(recipe, data, tmp_path / "runs")
    manifest = export(recipe, trained, data, tmp_path / "out")
    folder = tmp_path / "out" / recipe.name
    text = "It is day 3 of the long rain. It was."
    ids = trained.tokenizer.encode(text).ids
    blocks = [ids[start : start + 7] for start in range(0, len(ids), 7)]
    wanted = 0.0
    for block in blocks:
        with torch.no_grad():
            logits = trained.model.word_logits(trained.model.decode(torch.tensor([[2, *block[:-1]]])))[0]
        wanted -= logits.log_softmax(-1)[torch.arange(len(block)), torch.tensor(block)].sum().item()
    found = negative_log_likelihood(folder, text, block=7, rows=2)
    assert found == pytest.approx(wanted, rel=1e-5)
    write_set(tmp_path, "t", [{"text": text}], "validation")
    each = EvaluateRecipe(path="t")
    (score,) = evaluate(Server({}), manifest, folder, recipe, each, tmp_path, None).scores
    assert score.metric == "bits per byte"
    assert np.isclose(score.value, negative_log_likelihood(folder, text) / math.log(2) / len(text.encode()), atol=1e-3)
