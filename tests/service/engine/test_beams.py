"""Beam search over small languages of which every text is known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine.beams import BeamSearch, likeliest, log_softmax

EOS = 0
WORDS = 4


def language(seed: int) -> dict[tuple[int, ...], NDArray[np.float32]]:
    """Log probabilities of the next word after every text of up to three words."""
    random = np.random.default_rng(seed)
    texts = [text for length in range(4) for text in itertools.product(range(1, WORDS), repeat=length)]
    return {text: log_softmax(2 * random.standard_normal(WORDS).astype(np.float32)) for text in texts}


def search(
    after: dict[tuple[int, ...], NDArray[np.float32]], width: int, penalty: float, max_tokens: int
) -> BeamSearch:
    beams = BeamSearch(width, penalty, EOS, max_tokens)
    while not beams.over:
        before = beams.texts
        parents = beams.advance(np.stack([after[text] for text in beams.texts]))
        assert len(parents) == width
        assert all(text[:-1] == before[parent] for text, parent in zip(beams.texts, parents, strict=True))
        assert list(beams.scores) == sorted(beams.scores, reverse=True)
    return beams


def all_texts(
    after: dict[tuple[int, ...], NDArray[np.float32]], penalty: float, max_tokens: int
) -> dict[tuple[int, ...], float]:
    """The score of every text that ends by itself or at the limit, the latter with a mark behind it."""
    scores = {}
    for length in range(max_tokens + 1):
        for text in itertools.product(range(1, WORDS), repeat=length):
            total = math.fsum(float(after[text[:i]][word]) for i, word in enumerate(text))
            if length < max_tokens:
                scores[text] = (total + float(after[text][EOS])) / (length + 1) ** penalty
            else:
                scores[(*text, -1)] = total / length**penalty
    return scores


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_wide_enough_for_everything_finds_the_best_text(seed: int, penalty: float) -> None:
    after = language(seed)
    # Room for all 27 texts of three words, so that none is lost on the way.
    scores = all_texts(after, penalty, max_tokens=3)
    beams = BeamSearch(27, penalty, EOS, 3)
    while not beams.over:
        beams.advance(np.stack([after[text] for text in beams.texts]))
    best = beams.best
    found = best.ids if best.stopped else (*best.ids, -1)
    assert found == max(scores, key=scores.__getitem__)
    assert best.score == pytest.approx(scores[found], rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 3])
def test_scores_are_those_of_the_texts(seed: int, width: int) -> None:
    after = language(seed)
    scores = all_texts(after, 1.0, max_tokens=3)
    beams = search(after, width, 1.0, max_tokens=3)
    for hypothesis in beams.finished:
        key = hypothesis.ids if hypothesis.stopped else (*hypothesis.ids, -1)
        assert hypothesis.score == pytest.approx(scores[key], rel=1e-5)
    assert beams.best.score == max(hypothesis.score for hypothesis in beams.finished)


def fixed(*rows: list[float]) -> NDArray[np.float32]:
    return np.log(np.array(rows, dtype=np.float32))


def test_the_first_step_counts_one_beam() -> None:
    beams = BeamSearch(2, 1.0, EOS, 5)
    assert beams.advance(fixed([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])) == [0, 0]
    assert beams.texts == [(3,), (2,)]


def test_the_search_ends_early_when_nothing_unfinished_scores_better() -> None:
    beams = BeamSearch(2, 1.0, EOS, 100)
    beams.advance(fixed([0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.4, 0.4]))
    assert not beams.over
    beams.advance(fixed([0.97, 0.01, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]))
    assert beams.over
    assert beams.best.ids == (2,) and beams.best.stopped


def test_the_length_penalty_chooses_between_short_and_long() -> None:
    def best(penalty: float) -> tuple[int, ...]:
        beams = BeamSearch(2, penalty, EOS, 3)
        beams.advance(fixed([0.5, 0.5, 1e-9, 1e-9], [0.5, 0.5, 1e-9, 1e-9]))
        beams.advance(fixed([1e-9, 0.9, 0.1, 1e-9], [1e-9, 1e-9, 1e-9, 1e-9]))
        beams.advance(fixed([0.9, 0.1, 1e-9, 1e-9], [1e-9, 1e-9, 1e-9, 1e-9]))
        return beams.best.ids

    assert best(0.0) == ()  # log 0.5 against log 0.405
    assert best(1.0) == (1, 1)


def test_an_end_that_is_not_among_the_best_is_not_explored() -> None:
    beams = BeamSearch(2, 1.0, EOS, 100)
    beams.advance(fixed([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]))
    assert beams.finished == []


def test_log_softmax_equals_its_formula() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 30
    exact = logits.astype(np.float64)
    exact = (
        exact
        - np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - exact.max(-1, keepdims=True)
    )
    np.testing.assert_allclose(log_softmax(logits), exact, atol=1e-5)


@given(beams=st.integers(1, 4), words=st.integers(2, 300), seed=st.integers(0, 999))
def test_the_likeliest_are_those_of_a_full_sort(beams: int, words: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    log_probabilities = log_softmax(random.standard_normal((beams, words)).astype(np.float32))
    scores = np.sort(random.standard_normal(beams))[::-1]
    if seed % 2:
        scores[1:] = -np.inf
    every = [
        (float(scores[beam] + log_probabilities[beam, word]), beam, word)
        for beam in range(beams)
        for word in range(words)
    ]
    found = likeliest(scores, log_probabilities, 2 * beams)
    expected = sorted(every, key=lambda candidate: -candidate[0])[: 2 * beams]
    assert [score for score, _, _ in found] == [score for score, _, _ in expected]
    finite = [candidate for candidate in expected if candidate[0] > -np.inf]
    assert found[: len(finite)] == finite
