"""Loss as a power of parameters and tokens, fitted to stages that have ended. Knows nothing of how they ran."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.manifest import Stage

LEAST_STAGES = 4
"""One more than there are numbers to fit."""


@dataclass(frozen=True)
class Scaling:
    """``loss = exp(constant) parameters ** -a tokens ** -b`` (Kaplan et al. 2020, without an irreducible part)."""

    constant: float
    a: float
    b: float
    stages: int
    error: float
    """Standard deviation of the logarithm of the losses that it was fitted to: about a share of them."""

    def loss(self, parameters: float, tokens: float) -> float:
        """The expected loss."""
        return math.exp(self.constant - self.a * math.log(parameters) - self.b * math.log(tokens))


def fit_scaling(stages: Sequence[Stage], data: Sequence[str]) -> Scaling | str:
    """Least squares in logarithms over the stages that trained on ``data`` and nothing else; else why there is none.

    Only ends of runs count: while the learning rate is still high the loss is above that of a run planned to end there
    (Hoffmann et al. 2022, 3.1).
    """
    known = {(stage.parameters, stage.tokens): stage.loss for stage in stages if set(stage.data) == set(data)}
    points = [(n, tokens, loss) for (n, tokens), loss in known.items() if loss is not None and loss > 0 and tokens > 0]
    if len(points) < LEAST_STAGES:
        return f"{LEAST_STAGES} runs on the same data are needed, and there are {len(points)}"
    rows = np.array([(1.0, -math.log(n), -math.log(tokens)) for n, tokens, _ in points])
    losses = np.log([loss for *_, loss in points])
    if np.linalg.matrix_rank(rows - rows.mean(axis=0), tol=1e-6) < rows.shape[1] - 1:
        return f"the {len(points)} runs on the same data do not differ in both parameters and tokens"
    (constant, a, b), *_ = np.linalg.lstsq(rows, losses, rcond=None)
    error = float(np.sqrt(np.mean((rows @ (constant, a, b) - losses) ** 2)))
    return Scaling(float(constant), float(a), float(b), len(points), error)
