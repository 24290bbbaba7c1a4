"""How one token is chosen from a row of logits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.sampling import choose, repeating_tokens
from service.engine.types import Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], dtype=np.float32))


def frequencies(sampling: Sampling, draws: int = 4000) -> list[float]:
    random = np.random.default_rng(0)
    counts = np.bincount([choose(LOGITS, sampling, random) for _ in range(draws)], minlength=5)
    return [round(float(count / draws), 2) for count in counts]


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    random = np.random.default_rng(0)
    before = random.bit_generator.state
    assert choose(LOGITS, Sampling(max_tokens=1, top_k=3, top_p=0.5), random) == 1
    assert random.bit_generator.state == before


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(max_tokens=1, temperature=1.0), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(max_tokens=1, temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(max_tokens=1, temperature=1.0, top_k=9), [0.1, 0.4, 0.05, 0.3, 0.15]),
        # 0.4 + 0.3 falls short of 0.75, so the third comes in.
        (Sampling(max_tokens=1, temperature=1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (Sampling(max_tokens=1, temperature=1.0, top_p=0.3), [0, 1, 0, 0, 0]),
        # Of the two that top_k leaves, top_p keeps the first: 4 / 7 are more than a half.
        (Sampling(max_tokens=1, temperature=1.0, top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),
        (Sampling(max_tokens=1, temperature=0.5), list(np.array([1, 16, 0.25, 9, 2.25]) / 28.5)),
        (Sampling(max_tokens=1, temperature=1e-300), [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies_follow_temperature_top_k_and_top_p(sampling: Sampling, expected: list[float]) -> None:
    assert frequencies(sampling) == pytest.approx(expected, abs=0.025)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_a_draw_is_always_among_the_likeliest(logits: list[float], top_k: int, top_p: float, seed: int) -> None:
    row = np.array(logits, dtype=np.float32)
    sampling = Sampling(max_tokens=1, temperature=0.7, top_k=top_k, top_p=top_p)
    token = choose(row, sampling, np.random.default_rng(seed))
    assert token == choose(row.copy(), sampling, np.random.default_rng(seed))
    assert (row > row[token]).sum() < (top_k or len(row))


def test_ruled_out_tokens_are_never_drawn() -> None:
    row = LOGITS.copy()
    row[[1, 3]] = -np.inf
    random = np.random.default_rng(0)
    assert {choose(row, Sampling(max_tokens=1, temperature=1.0), random) for _ in range(200)} == {0, 2, 4}


def test_an_n_gram_is_not_repeated() -> None:
    assert repeating_tokens([5, 6, 7, 5, 6], 3) == [7]
    assert repeating_tokens([5, 6, 5, 7, 5], 2) == [6, 7]
    assert repeating_tokens([5, 6, 5], 1) == [5, 6, 5]
    assert repeating_tokens([5, 6], 3) == []
    assert repeating_tokens([5, 5, 5], 0) == []
