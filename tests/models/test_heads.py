"""Heads by their properties: order and names do not matter, probabilities are such, and leaving out is leaving out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import heads
from models.heads import Floats, features_of, fit

WIDTH = 6


def drawn(seed: int, n: int, n_labels: int, noise: float = 0.3) -> tuple[Floats, np.ndarray]:
    """Features of ``n`` examples around a centre for each label, of which every label has at least two."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_labels), np.arange(n_labels), rng.integers(0, n_labels, n - 2 * n_labels)])
    centres = rng.normal(size=(n_labels, 2 * WIDTH))
    vectors = centres[labels] + noise * rng.normal(size=(n, 2 * WIDTH))
    return features_of(vectors.astype(np.float32), WIDTH), labels


draws = given(seed=st.integers(0, 10_000), n=st.integers(8, 40), n_labels=st.integers(2, 4))


@draws
@settings(max_examples=30, deadline=None)
def test_probabilities_are_above_0_and_sum_to_1(seed: int, n: int, n_labels: int) -> None:
    features, labels = drawn(seed, n, n_labels)
    head, accuracy = fit(features, labels, n_labels)
    probabilities = head.probabilities(features)
    assert probabilities.shape == (n, n_labels)
    assert (probabilities > 0).all() and 0 <= accuracy <= 1
    np.testing.assert_allclose(probabilities.sum(1), 1)


@draws
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_examples_does_not_matter(seed: int, n: int, n_labels: int) -> None:
    features, labels = drawn(seed, n, n_labels)
    order = np.random.default_rng(seed).permutation(n)
    one, one_accuracy = fit(features, labels, n_labels)
    other, other_accuracy = fit(features[order], labels[order], n_labels)
    np.testing.assert_allclose(one.probabilities(features), other.probabilities(features), atol=1e-6)
    assert one_accuracy == pytest.approx(other_accuracy)


@draws
@settings(max_examples=30, deadline=None)
def test_labels_of_other_numbers_get_the_same_probabilities(seed: int, n: int, n_labels: int) -> None:
    features, labels = drawn(seed, n, n_labels)
    numbers = np.random.default_rng(seed).permutation(n_labels)
    one, _ = fit(features, labels, n_labels)
    other, _ = fit(features, numbers[labels], n_labels)
    np.testing.assert_allclose(one.probabilities(features), other.probabilities(features)[:, numbers], atol=1e-6)


def test_the_formula_for_leaving_out_is_a_head_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: for every example a ridge regression on the others."""
    ridge = 0.3
    monkeypatch.setattr(heads, "_RIDGES", (ridge,))
    seen: list[Floats] = []
    sharpen = heads._sharpen
    monkeypatch.setattr(
        heads, "_sharpen", lambda predictions, labels: seen.append(predictions) or sharpen(predictions, labels)
    )
    features, labels = drawn(0, 12, 3, noise=1.0)
    _, accuracy = fit(features, labels, 3)
    right = []
    for place in range(12):
        rest = np.arange(12) != place
        x, y = features[rest], np.eye(3)[labels[rest]]
        centred = x - x.mean(0)
        weights = np.linalg.solve(centred.T @ centred + ridge * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
        predicted = (features[place] - x.mean(0)) @ weights + y.mean(0)
        np.testing.assert_allclose(seen[0][place], predicted, atol=1e-9)
        right.append(predicted.argmax() == labels[place])
    assert accuracy == pytest.approx(np.mean(right))


def test_what_is_apart_is_told_apart_and_what_is_not_is_left_open() -> None:
    features, labels = drawn(1, 24, 3, noise=0.1)
    head, accuracy = fit(features, labels, 3)
    assert accuracy == 1
    assert (head.probabilities(features).argmax(1) == labels).all()
    # The same text with every label says nothing.
    same, _ = fit(np.ones((4, 3)), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(same.probabilities(np.ones((1, 3))), 0.5)


def test_the_length_of_a_vector_and_of_its_parts_does_not_count() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 2 * WIDTH)).astype(np.float32)
    longer = vectors * 7
    longer[:, WIDTH:] *= 3
    np.testing.assert_allclose(features_of(longer, WIDTH), features_of(vectors, WIDTH), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(features_of(vectors, WIDTH), axis=1), 1)
    assert not features_of(np.zeros((1, WIDTH), np.float32), WIDTH).any()
