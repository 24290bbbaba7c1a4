"""A classifier over vectors, fitted in closed form: arrays in, arrays out. Knows nothing of texts or Transformers.

Ridge regression on one-hot labels. Leaving one example out has a closed form too, and chooses how strong the ridge is
and how sharp the probabilities are: what an example says of itself counts for neither.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_RIDGES = (0.03, 0.1, 0.3, 1.0)
_SHARPNESS = np.geomspace(0.5, 100, 40)
"""Inverse temperatures that are tried."""


@dataclass(frozen=True, slots=True)
class Head:
    """Turns features into probabilities of labels."""

    weights: Floats
    """(features, labels)"""
    bias: Floats
    """(labels,)"""
    sharpness: float

    def probabilities(self, features: Floats) -> Floats:
        """(n, features) -> (n, labels); each row sums to 1."""
        probabilities: Floats = np.exp(_log_softmax(self.sharpness * (features @ self.weights + self.bias)))
        return probabilities


def features_of(vectors: NDArray[np.float32], width: int) -> Floats:
    """Vectors (n, l * width) with each of their l parts brought to the same length, and the whole to length 1."""
    parts = vectors.astype(np.float64).reshape(len(vectors), -1, width)
    lengths = np.linalg.norm(parts, axis=2, keepdims=True) * np.sqrt(parts.shape[1])
    # A part of zeros has no direction.
    features: Floats = parts / np.maximum(lengths, np.finfo(np.float32).tiny)
    return features.reshape(len(vectors), -1)


def fit(features: Floats, labels: NDArray[np.int64], n_labels: int) -> tuple[Head, float]:
    """A head for examples (n, features) with ``labels`` (n,), and the share of them that it gets right when each is
    left out.

    The ridge and the sharpness are those under which the labels are likeliest when left out.
    """
    n = len(labels)
    targets = np.eye(n_labels)[labels]
    mean, frequency = features.mean(0), targets.mean(0)
    centred, deviations = features - mean, targets - frequency
    # In the space of the examples, which are fewer than the features: centred = axes * sqrt(values) * ...
    values, axes = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values, 0.0)
    found = []
    for ridge in _RIDGES:
        hat = (axes * (values / (values + ridge))) @ axes.T
        residuals = deviations - hat @ deviations
        # Prediction of an example by all others (Allen 1974); 1 / n is the mean's part of its leverage.
        left_out = targets - residuals / (1 - np.diag(hat) - 1 / n)[:, None]
        sharpness, loss = _sharpen(left_out, labels)
        found.append((loss, ridge, sharpness, left_out))
    _, ridge, sharpness, left_out = min(found, key=lambda each: each[:2])
    weights = centred.T @ ((axes / (values + ridge)) @ (axes.T @ deviations))
    head = Head(weights, frequency - mean @ weights, sharpness)
    return head, float((left_out.argmax(1) == labels).mean())


def _sharpen(predictions: Floats, labels: NDArray[np.int64]) -> tuple[float, float]:
    """The inverse temperature under which ``labels`` are likeliest, and the mean negative log-likelihood.

    Labels count as not quite certain, by one example more of every label (after Platt 1999): a few examples that are
    told apart without error do not make a classifier that never errs.
    """
    n, n_labels = predictions.shape
    targets = (n * np.eye(n_labels)[labels] + 1) / (n + n_labels)
    losses = [-float((targets * _log_softmax(each * predictions)).sum(1).mean()) for each in _SHARPNESS]
    best = int(np.argmin(losses))
    return float(_SHARPNESS[best]), losses[best]


def _log_softmax(logits: Floats) -> Floats:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))  # type: ignore[no-any-return]
