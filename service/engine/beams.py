"""Beam searches side by side, all of one width: pure bookkeeping over log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A text that has ended; ``score`` is its log probability over ``length ** length_penalty``."""

    score: float
    ids: tuple[int, ...]
    """Without the end-of-text id, which counts in the length."""
    stopped: bool
    """Whether it ended by itself and not at the limit."""


@dataclass(frozen=True, slots=True)
class Copy:
    """What row ``source`` has read has to be copied to ``target``, which already holds the first ``start`` tokens."""

    source: int
    target: int
    start: int


class Beams:
    """Up to ``n_texts`` searches; text t has the rows ``t * width`` to ``t * width + width - 1``, one for each beam.

    A search ends when ``width`` texts have finished and no unfinished one scores better as it stands (the rule of
    Hugging Face's ``early_stopping=False``), or at its limit.
    """

    def __init__(self, width: int, eos: int | None, n_texts: int, max_tokens: int) -> None:
        self.width = width
        # Of no word, so that no word ends a text.
        self._eos = -1 if eos is None else eos
        self._n = 0
        self._scores = np.zeros((n_texts, width))
        self._ids = np.zeros((n_texts, width, max_tokens), dtype=np.int64)
        self._lengths = np.zeros(n_texts, dtype=np.int64)
        self._limits = np.zeros(n_texts, dtype=np.int64)
        self._penalties = np.zeros(n_texts)
        self._alike = np.zeros((n_texts, width, width), dtype=np.int64)
        """How many of the first tokens that two rows of a text have read are the same."""
        self._finished: list[list[Hypothesis]] = []

    @property
    def next_ids(self) -> Ids:
        """The last word of each row; of a text that has none, any number."""
        return self._ids[np.arange(self._n), :, self._lengths[: self._n] - 1].reshape(-1)

    def length(self, text: int) -> int:
        """How many words a text has."""
        return int(self._lengths[text])

    def written(self, text: int) -> list[list[int]]:
        """The words of each beam of a text."""
        return self._ids[text, :, : self._lengths[text]].tolist()  # type: ignore[no-any-return]

    def join(self, max_tokens: int, length_penalty: float) -> None:
        """Add a search, the last one from now on."""
        text = self._n
        self._n += 1
        # All beams start alike: the first alone counts, or they would stay so.
        self._scores[text] = [0.0] + [-np.inf] * (self.width - 1)
        self._lengths[text] = 0
        self._limits[text], self._penalties[text] = max_tokens, length_penalty
        self._alike[text] = 0
        self._finished.append([])

    def leave(self, text: int) -> None:
        """Forget a search; the last one moves into its place."""
        self._n -= 1
        for state in (self._scores, self._ids, self._lengths, self._limits, self._penalties, self._alike):
            state[text] = state[self._n]
        self._finished[text] = self._finished[-1]
        self._finished.pop()

    def advance(self, first: int, scores: Floats, words: Ids, read: Ids) -> tuple[list[Copy], dict[int, Hypothesis]]:
        """Take a step with the searches from ``first`` on.

        ``scores`` and ``words`` (rows, 2 * width) are the likeliest continuations of each of their rows, best first:
        each beam can end in one way, so twice as many hold enough that go on. ``read`` (texts,) is how many tokens
        each text's rows have read. Returns what rows have to copy before they read on, and the best text of each
        search that is over.
        """
        n, width, count = len(read), self.width, words.shape[1]
        here, each = slice(first, first + n), np.arange(n)[:, None]
        totals = (self._scores[here, :, None] + scores.reshape(n, width, count)).reshape(n, -1)
        words = words.reshape(n, -1)
        best = np.argsort(-totals, axis=1, kind="stable")[:, : 2 * width]
        ends = words[each, best] == self._eos
        lengths = self._lengths[here] = self._lengths[here] + 1
        if ends.any():
            # Ends below the width would not have been explored further either.
            for number, rank in np.argwhere(ends[:, :width]).tolist():
                place = best[number, rank]
                ids = self._ids[first + number, place // count, : lengths[number] - 1]
                self._finish(first + number, totals[number, place], ids, stopped=True)
            best = best[each, np.argsort(ends, axis=1, kind="stable")]
        best = best[:, :width]
        leading = totals[each[:, 0], best[:, 0]]
        # From best to worst becomes by row: the first child of a beam stays in its row.
        order, copied = _into_rows(best // count)
        best = best[each, order]
        parents, tokens, totals = best // count, words[each, best], totals[each, best]
        alike = self._alike[here]
        copies = [
            Copy(
                source=int((first + number) * width + parents[number, row]),
                target=int((first + number) * width + row),
                start=int(alike[number, row, parents[number, row]]),
            )
            for number, row in copied
        ]
        same = parents[:, :, None] == parents[:, None, :]
        alike = alike[each[:, :, None], parents[:, :, None], parents[:, None, :]]
        self._alike[here] = np.where(same, read[:, None, None], alike)
        self._scores[here] = totals
        for number in {number for number, _ in copied}:
            self._ids[first + number] = self._ids[first + number, parents[number]]
        self._ids[first + each, np.arange(width), lengths[:, None] - 1] = tokens
        return copies, self._over(range(first, first + n), leading)

    def _over(self, texts: Sequence[int], leading: NDArray[np.float64]) -> dict[int, Hypothesis]:
        over = {}
        for text, score in zip(texts, leading, strict=True):
            finished = self._finished[text]
            length = int(self._lengths[text])
            if length == self._limits[text]:
                over[text] = self.cut(text)
            elif len(finished) == self.width and finished[-1].score >= score / length ** self._penalties[text]:
                over[text] = self._best(text)
        return over

    def cut(self, text: int) -> Hypothesis:
        """The best text of a search that ends here: its unfinished ones count as they stand."""
        for row in np.argsort(-self._scores[text], kind="stable").tolist():
            ids = self._ids[text, row, : self._lengths[text]]
            self._finish(text, self._scores[text, row], ids, stopped=False)
        return self._best(text)

    def _best(self, text: int) -> Hypothesis:
        """The earlier one of equals."""
        return max(self._finished[text], key=lambda hypothesis: hypothesis.score)

    def _finish(self, text: int, score: float, ids: Ids, *, stopped: bool) -> None:
        finished = self._finished[text]
        score = float(score / self._lengths[text] ** self._penalties[text])
        finished.append(Hypothesis(score, tuple(ids.tolist()), stopped))
        finished.sort(key=lambda hypothesis: -hypothesis.score)
        del finished[self.width :]


def _into_rows(parents: Ids) -> tuple[Ids, list[tuple[int, int]]]:
    """Which of the chosen continuations goes into each row ``(texts, width)``, where continuation i is a child of row
    ``parents[text, i]``; and the rows that a further child of another row gets, as (text, row)."""
    order = np.argsort(parents, axis=1, kind="stable")
    copied = []
    for text in np.flatnonzero((np.sort(parents, axis=1) != np.arange(parents.shape[1])).any(1)).tolist():
        places: dict[int, int] = {}
        further = []
        for child, parent in enumerate(parents[text].tolist()):
            if places.setdefault(parent, child) != child:
                further.append(child)
        free = [row for row in range(parents.shape[1]) if row not in places]
        copied += [(text, row) for row in free]
        places |= dict(zip(free, further, strict=True))
        order[text] = [places[row] for row in range(parents.shape[1])]
    return order, copied
