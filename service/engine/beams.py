"""Beam search for one text: pure bookkeeping over log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that has ended; ``score`` is its log probability over ``length ** length_penalty``."""

    score: float
    ids: tuple[int, ...]
    """Without the end-of-text id, which counts in the length."""
    stopped: bool
    """Whether it ended by itself and not at the limit."""


class BeamSearch:
    """The ``width`` likeliest unfinished texts, and the best finished ones.

    Ends when ``width`` texts have finished and no unfinished one scores better as it stands (the rule of Hugging
    Face's ``early_stopping=False``), or at ``max_tokens``.
    """

    def __init__(self, width: int, length_penalty: float, eos: int | None, max_tokens: int) -> None:
        self.width, self.length_penalty, self.eos, self.max_tokens = width, length_penalty, eos, max_tokens
        self.texts: list[tuple[int, ...]] = [()] * width
        # All beams start alike: the first alone counts, or they would stay so.
        self.scores = np.array([0.0] + [-np.inf] * (width - 1))
        self.finished: list[Hypothesis] = []
        self.over = False

    @property
    def best(self) -> Hypothesis:
        """The best text that has ended, the earlier one of equals."""
        return max(self.finished, key=lambda hypothesis: hypothesis.score)

    def advance(self, log_probabilities: NDArray[np.float32]) -> list[int]:
        """Take one step with ``(width, words)``; returns which beam each of the new ``texts`` continues."""
        words = log_probabilities.shape[1]
        totals = (self.scores[:, None] + log_probabilities).ravel()
        # Each beam can end in one way, so twice as many candidates hold enough that go on.
        wanted = min(2 * self.width, len(totals))
        candidates = np.argpartition(-totals, wanted - 1)[:wanted]
        candidates = candidates[np.lexsort((candidates, -totals[candidates]))]
        length = len(self.texts[0]) + 1
        parents: list[int] = []
        texts: list[tuple[int, ...]] = []
        scores: list[float] = []
        for rank, (candidate, score) in enumerate(zip(candidates.tolist(), totals[candidates].tolist(), strict=True)):
            parent, token = divmod(candidate, words)
            if token == self.eos:
                # Ends below the width would not have been explored further either.
                if rank < self.width:
                    self._finish(score, length, self.texts[parent], stopped=True)
            elif len(parents) < self.width:
                parents.append(parent)
                texts.append((*self.texts[parent], token))
                scores.append(score)
        self.texts, self.scores = texts, np.array(scores)
        if length == self.max_tokens:
            for text, score in zip(texts, scores, strict=True):
                self._finish(score, length, text, stopped=False)
            self.over = True
        elif len(self.finished) == self.width:
            self.over = self.finished[-1].score >= self._normalised(scores[0], length)
        return parents

    def _normalised(self, score: float, length: int) -> float:
        return float(score / length**self.length_penalty)

    def _finish(self, score: float, length: int, ids: Sequence[int], *, stopped: bool) -> None:
        self.finished.append(Hypothesis(self._normalised(score, length), tuple(ids), stopped))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.width :]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))  # type: ignore[no-any-return]
