"""Beam searches side by side, all of one width: pure bookkeeping over log probabilities.

Over lists and not arrays: a step of one search takes a few dozen numbers, and each call of NumPy as long as ten of
them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Copy(NamedTuple):
    """What row ``source`` has read has to be copied to ``target``, which already holds the first ``start`` tokens."""

    source: int
    target: int
    start: int


class Beams:
    """Searches next to each other; text t has the rows ``t * width`` to ``t * width + width - 1``, one for each beam.

    A search ends when ``width`` texts have finished and no unfinished one scores better as it stands (the rule of
    Hugging Face's ``early_stopping=False``), or at its limit.
    """

    def __init__(self, width: int, eos: int | None) -> None:
        self.width, self._eos = width, eos
        self._searches: list[_Search] = []

    @property
    def next_ids(self) -> list[int]:
        """The last word of each row, or what its text starts from."""
        return [word for search in self._searches for word in search.next_ids]

    def written(self, text: int) -> list[list[int]]:
        """The words of each beam of a text."""
        return self._searches[text].ids

    def join(self, max_tokens: int, length_penalty: float, bos: int = 0) -> None:
        """Add a search, the last one from now on."""
        self._searches.append(_Search(self.width, self._eos, max_tokens, length_penalty, bos))

    def leave(self, text: int) -> None:
        """Forget a search; the last one moves into its place."""
        self._searches[text] = self._searches[-1]
        self._searches.pop()

    def advance(
        self, first: int, scores: Floats, words: Ids, read: Sequence[int]
    ) -> tuple[list[Copy], dict[int, Hypothesis]]:
        """Take a step with the searches from ``first`` on.

        ``scores`` and ``words`` (rows, 2 * width) are the likeliest continuations of each of their rows, best first:
        each beam can end in one way, so twice as many hold enough that go on. ``read`` is how many tokens the rows of
        each of these texts have read. Returns what rows have to copy before they read on, and the best text of each
        search that is over.
        """
        scores_of, words_of, width = scores.tolist(), words.tolist(), self.width
        copies: list[Copy] = []
        over: dict[int, Hypothesis] = {}
        for number, n_read in enumerate(read):
            text, rows = first + number, slice(number * width, (number + 1) * width)
            search = self._searches[text]
            for source, target, start in search.advance(scores_of[rows], words_of[rows], n_read):
                copies.append(Copy(text * width + source, text * width + target, start))
            if (best := search.best_if_over()) is not None:
                over[text] = best
        return copies, over

    def cut(self, text: int) -> Hypothesis:
        """The best text of a search that ends here: its unfinished ones count as they stand."""
        return self._searches[text].cut()


class _Search:
    """One of them; its rows count from 0."""

    def __init__(self, width: int, eos: int | None, max_tokens: int, length_penalty: float, bos: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(width)]
        self._width, self._eos, self._bos = width, eos, bos
        self._max_tokens, self._penalty = max_tokens, length_penalty
        # All beams start alike: the first alone counts, or they would stay so.
        self._scores = [0.0] + [-np.inf] * (width - 1)
        self._alike = [[0] * width for _ in range(width)]
        """How many of the first tokens that two rows have read are the same."""
        self._leading = 0.0
        self._finished: list[Hypothesis] = []

    @property
    def next_ids(self) -> list[int]:
        return [ids[-1] if ids else self._bos for ids in self.ids]

    def advance(
        self, scores: Sequence[Sequence[float]], words: Sequence[Sequence[int]], read: int
    ) -> list[tuple[int, int, int]]:
        """Let every beam go on; returns what has to be copied: source, target, start."""
        totals, parents, chosen = self._choose(scores, words)
        self._leading = totals[0]
        rows, copied = _into_rows(parents)
        copies: list[tuple[int, int, int]] = []
        if copied:
            parents = [parents[child] for child in rows]
            copies = [(parents[row], row, self._alike[row][parents[row]]) for row in copied]
            self._alike = [[read if a == b else self._alike[a][b] for b in parents] for a in parents]
            for source, target, _ in copies:
                self.ids[target] = self.ids[source].copy()
        for ids, child in zip(self.ids, rows, strict=True):
            ids.append(chosen[child])
        self._scores = [totals[child] for child in rows]
        return copies

    def _choose(
        self, scores: Sequence[Sequence[float]], words: Sequence[Sequence[int]]
    ) -> tuple[list[float], list[int], list[int]]:
        """The best continuations that go on, the best first: their scores, parents and words. Keeps texts that end."""
        before, width, length = self._scores, self._width, len(self.ids[0]) + 1
        # Of each beam, the best continuation that was not looked at yet: of a few numbers, quicker than a heap.
        heads = [total + row[0] for total, row in zip(before, scores, strict=True)]
        beams, places = list(range(width)), [0] * width
        totals: list[float] = []
        parents: list[int] = []
        chosen: list[int] = []
        rank = 0
        while heads and len(totals) < width:
            # Of equals, the first.
            total = max(heads)
            head = heads.index(total)
            parent = beams[head]
            place = places[parent]
            word = words[parent][place]
            if word != self._eos:
                totals.append(total)
                parents.append(parent)
                chosen.append(word)
            elif rank < width:
                # Ends below the width would not have been explored further either.
                self._finish(total, self.ids[parent], length, stopped=True)
            rank, place = rank + 1, place + 1
            if place < len(scores[parent]):
                heads[head], places[parent] = before[parent] + scores[parent][place], place
            else:
                del heads[head], beams[head]
        return totals, parents, chosen

    def best_if_over(self) -> Hypothesis | None:
        """The best text, if the search is over."""
        length, finished = len(self.ids[0]), self._finished
        if length == self._max_tokens:
            return self.cut()
        if len(finished) == self._width and finished[-1].score >= self._leading / length**self._penalty:
            return finished[0]
        return None

    def cut(self) -> Hypothesis:
        """See ``Beams``."""
        for row in sorted(range(self._width), key=lambda row: -self._scores[row]):
            self._finish(self._scores[row], self.ids[row], len(self.ids[row]), stopped=False)
        return self._finished[0]

    def _finish(self, score: float, ids: Sequence[int], length: int, *, stopped: bool) -> None:
        """Keep a text among the ``width`` best, best first, behind earlier ones that are as good."""
        self._finished.append(Hypothesis(score / length**self._penalty, tuple(ids), stopped))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self._finished[self._width :]


def _into_rows(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which of the chosen continuations goes into each row, where continuation i is a child of row ``parents[i]``; and
    the rows that a further child of another row gets. The first child of a row stays there."""
    rows, further = [-1] * len(parents), []
    for child, parent in enumerate(parents):
        if rows[parent] < 0:
            rows[parent] = child
        else:
            further.append(child)
    free = [row for row, child in enumerate(rows) if child < 0] if further else []
    for row, child in zip(free, further, strict=True):
        rows[row] = child
    return rows, free
