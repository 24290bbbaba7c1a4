"""Windows cover a context, spans come back letter by letter, and the model may abstain."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from models.manifest import Confidence
from service.engine.types import EncodeOutput, Timing
from service.errors import InvalidValue, TooManyTokens
from service.knowledge.store import Passage
from service.models import Model
from service.tasks.answer import RANK_WEIGHT, Answer, AnswerRequest, Asked, read_answer, read_passages
from service.tasks.spans import MAX_ANSWER_TOKENS, STRIDE, Reading, Window, split_windows
from tests.service.fakes import CLS, SEP, FakeEngine

TASK = Answer()


def encode(model: Model, question: str, context: str, **options: Any) -> Any:
    return TASK.encode(AnswerRequest(question=question, context=context, **options), model, "req-1")


@given(tokens=st.integers(1, 5000), room=st.integers(1, 600))
def test_windows_cover_everything_and_overlap_by_the_stride(tokens: int, room: int) -> None:
    windows = list(split_windows(tokens, room))
    overlap = min(STRIDE, room // 2)
    assert windows[0].first == 0
    assert windows[-1].first + windows[-1].tokens == tokens
    assert all(0 < window.tokens <= room for window in windows)
    for left, right in pairwise(windows):
        assert left.first + left.tokens - right.first == overlap
        assert right.first + right.tokens > left.first + left.tokens


def test_a_sequence_is_question_and_context_framed_and_typed(models: dict[str, Model]) -> None:
    (item,) = encode(models["answer"], "what city", "paris is good").items
    vocabulary = models["answer"].tokenizer.get_vocab()
    words = [vocabulary[word] for word in ("what", "city", "paris", "is", "good")]
    assert item.input_ids == (CLS, *words[:2], SEP, *words[2:], SEP)
    assert item.token_types == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_long_context_is_read_in_windows_that_fit(models: dict[str, Model]) -> None:
    model = models["answer"]
    encoded = encode(model, "what city", "good " * 400)
    assert len(encoded.items) > 1
    assert all(len(item.input_ids) <= model.manifest.max_input_tokens for item in encoded.items)
    assert {item.input_ids[:4] for item in encoded.items} == {encoded.items[0].input_ids[:4]}


def test_a_question_may_take_half_of_what_the_model_reads(models: dict[str, Model]) -> None:
    most = models["answer"].manifest.max_input_tokens // 2 - 2
    encode(models["answer"], "what " * most, "paris")
    with pytest.raises(TooManyTokens, match=f"at most {most} "):
        encode(models["answer"], "what " * (most + 1), "paris")
    (cut,) = encode(models["answer"], "what " * (most + 1), "paris", truncate=True).items
    assert len(cut.input_ids) == most + 4


def test_questions_and_contexts_come_in_pairs() -> None:
    with pytest.raises(InvalidValue, match="as many as questions"):
        AnswerRequest(question=["what", "where"], context="paris")


@pytest.mark.parametrize(
    "context",
    [
        "The capital of France is Paris.",
        "\U0001f600 \U0001f1eb\U0001f1f7 caf\u00e9 cafe\u0301: paris! \U0001f600",
        "good " * 300 + "PARIS" + " bad" * 300,
        "e\u0301" * 50 + " paris",
        "\n\tparis\r\n",
    ],
)
def test_the_answer_is_the_context_letter_by_letter(client: TestClient, context: str) -> None:
    body = {"question": "what is the capital of france?", "context": context}
    (result,) = client.post("/v1/answer", json=body).json()["results"]
    assert result["answer"].lower() == "paris"
    assert context[result["start"] : result["end"]] == result["answer"]
    assert (result["abstained"], 0.9 < result["score"] <= 1) == (False, True)


def test_a_combining_mark_stays_with_its_letter(models: dict[str, Model]) -> None:
    context = "good cafe\u0301 good"
    encoded = encode(models["answer"], "what", context)
    assert len(encoded.plan[0].readings[0].offsets) == 3
    logits = np.full((len(encoded.items[0].input_ids), 2), -5, np.float32)
    logits[4] = 5  # [CLS] what [SEP] good cafe good [SEP]
    result = read_answer(encoded.plan[0].readings[0], [logits], 0.0)
    assert result.answer == "cafe\u0301" == context[result.start : result.end]


def test_without_an_answer_the_model_abstains(client: TestClient) -> None:
    body = {"question": "what is the capital?", "context": "good " * 300}
    (result,) = client.post("/v1/answer", json=body).json()["results"]
    assert (result["answer"], result["start"], result["end"], result["abstained"]) == ("", None, None, True)
    assert 0.5 < result["score"] <= 1


def test_lists_are_answered_pair_by_pair(client: TestClient, engine: FakeEngine) -> None:
    contexts = ["good " * 200 + "paris", "bad"]
    body = {"question": ["what?", "where?"], "context": contexts}
    results = client.post("/v1/answer", json=body).json()["results"]
    assert [result["answer"] for result in results] == ["paris", ""]
    assert len(engine.items) > 2


def reading(windows: list[tuple[int, int]], tokens: int) -> Reading:
    """A context of words of one letter, three tokens before it in every window."""
    offsets = [(2 * place, 2 * place + 1) for place in range(tokens)]
    return Reading("x " * tokens, offsets, 3, tuple(Window(*window) for window in windows))


def logits(tokens: int, starts: dict[int, float], ends: dict[int, float], null: float = 0.0) -> Any:
    """Logits of a window: of its context tokens, and half of ``null`` twice at its first."""
    scores = np.full((3 + tokens + 1, 2), -20.0, np.float32)
    scores[0] = null / 2
    for place, score in starts.items():
        scores[3 + place, 0] = score
    for place, score in ends.items():
        scores[3 + place, 1] = score
    return scores


def test_a_span_never_ends_before_it_starts() -> None:
    result = read_answer(reading([(0, 6)], 6), [logits(6, {4: 9.0, 1: 5.0}, {2: 9.0, 5: 4.0})], 0.0)
    assert (result.start, result.end) == (2, 5)


def test_a_span_has_at_most_thirty_tokens() -> None:
    far, near = MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS - 1
    result = read_answer(reading([(0, 40)], 40), [logits(40, {0: 9.0}, {far: 9.0, near: 5.0})], 0.0)
    assert (result.start, result.end) == (0, 2 * near + 1)


def test_question_and_separators_are_never_part_of_an_answer() -> None:
    scores = logits(4, {1: 1.0}, {1: 1.0})
    scores[[1, 2, -1]] = 99
    result = read_answer(reading([(0, 4)], 4), [scores], 0.0)
    assert (result.start, result.end) == (2, 3)


def test_the_best_window_answers_and_the_least_null_score_counts() -> None:
    windows = [(0, 4), (2, 4)]
    weak, strong = logits(4, {3: 2.0}, {3: 2.0}, null=50.0), logits(4, {2: 4.0}, {2: 4.0}, null=1.0)
    result = read_answer(reading(windows, 6), [weak, strong], 0.0)
    assert (result.start, result.end, result.abstained) == (8, 9, False)
    # A softmax over "no answer" and every span; one seen by two windows counts once.
    others = math.exp(1.0) + math.exp(4.0)
    assert result.score == pytest.approx(math.exp(8.0) / (math.exp(8.0) + others), rel=1e-6)


@pytest.mark.parametrize(("threshold", "abstained"), [(-2.0, True), (-1.0, False), (0.0, False)])
def test_the_threshold_decides_when_to_abstain(threshold: float, abstained: bool) -> None:
    scores = logits(4, {1: 1.0}, {1: 1.0}, null=0.5)
    result = read_answer(reading([(0, 4)], 4), [scores], threshold)
    assert result.abstained is abstained


@given(st.lists(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=2), min_size=6, max_size=60))
def test_any_logits_give_the_best_span(rows: list[list[float]]) -> None:
    scores = np.array(rows, np.float32)
    tokens = len(rows) - 4
    result = read_answer(reading([(0, tokens)], tokens), [scores], threshold=1e9)
    best = max(
        float(scores[3 + first, 0]) + float(scores[3 + last, 1])
        for first in range(tokens)
        for last in range(first, min(tokens, first + MAX_ANSWER_TOKENS))
    )
    found = float(scores[3 + result.start // 2, 0]) + float(scores[3 + (result.end - 1) // 2, 1])
    assert found == pytest.approx(best)
    assert 0 < result.score <= 1


def test_a_caller_may_want_a_span_at_any_price(models: dict[str, Model]) -> None:
    spans = {}
    for abstain in (True, False):
        encoded = encode(models["answer"], "what city", "paris is good", abstain=abstain)
        logits = np.zeros((len(encoded.items[0].input_ids), 2), dtype=np.float32)
        logits[0] = 9.0
        output = EncodeOutput(logits, Timing(queue_ns=0, compute_ns=1))
        (spans[abstain],) = TASK.decode(encoded.plan, models["answer"], [output])
    assert spans[True].abstained
    assert not spans[False].abstained
    assert spans[False].answer in "paris is good"
    assert spans[False].score < 0.5


CALIBRATED = Confidence(slope=1.0, intercept=-5.0, least=0.5, data="none", rows=1)


def passages_of(*spans: float, null: float = 0.0, may_abstain: bool = True, **options: Any) -> Any:
    """What is made of passages, each of ten words from character 100 on, whose best span scores as said."""
    passages = [Passage(f"document {n}", 100, 119, "x " * 10, {"n": n}, 1 / n) for n, _ in enumerate(spans, start=1)]
    asked = Asked(tuple(reading([(0, 10)], 10) for _ in spans), may_abstain, tuple(passages))
    scores = [[logits(10, {n: score}, {n: 0.0}, null=null)] for n, score in enumerate(spans)]
    return read_passages(asked, passages, scores, options.get("threshold", 0.0), options.get("calibrated"))


def test_the_best_span_of_all_passages_answers_in_its_documents_characters() -> None:
    result = passages_of(1.0, 8.0, 2.0)
    assert (result.answer, result.start, result.end, result.document) == ("x", 102, 103, "document 2")
    assert [passage.document for passage in result.passages] == ["document 1", "document 2", "document 3"]
    assert result.passages[1].metadata == {"n": 2}
    # A softmax over the spans of all passages and "no answer", ranks counted in.
    weights = [math.exp(score - RANK_WEIGHT * math.log(rank)) for rank, score in enumerate((1.0, 8.0, 2.0), start=1)]
    assert result.score == pytest.approx(weights[1] / (sum(weights) + 1), rel=1e-6)


@pytest.mark.parametrize(("lead", "document"), [(0.1, "document 1"), (-0.1, "document 2")])
def test_a_later_passage_must_be_better_by_its_ranks_weight(lead: float, document: str) -> None:
    assert passages_of(3.0, 3.0 + RANK_WEIGHT * math.log(2) - lead).document == document


def test_a_calibrated_reader_abstains_below_its_least_confidence() -> None:
    sure, unsure = passages_of(6.0, calibrated=CALIBRATED), passages_of(4.0, calibrated=CALIBRATED)
    assert (sure.abstained, sure.confidence) == (False, pytest.approx(1 / (1 + math.exp(-1))))
    assert (unsure.abstained, unsure.confidence) == (True, pytest.approx(1 / (1 + math.exp(1))))
    assert (unsure.answer, unsure.start, unsure.document, len(unsure.passages)) == ("", None, None, 1)
    assert passages_of(4.0, calibrated=CALIBRATED, may_abstain=False).answer == "x"
    assert passages_of(calibrated=CALIBRATED).confidence == 0.0
    assert 0 <= CALIBRATED.of(-1e6) < 1e-200


def test_any_other_abstains_where_no_answer_scores_best() -> None:
    assert passages_of(4.0, null=4.5).abstained
    assert not passages_of(4.0, null=4.5, threshold=1.0).abstained
    assert passages_of(4.0, null=3.5).confidence is None
