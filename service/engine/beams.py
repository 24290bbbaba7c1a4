"""Beam searches side by side, all of one width: pure bookkeeping over log probabilities.

Over lists and not arrays: a step of one search takes a few dozen numbers, and each call of NumPy as long as ten of
them.
"""

import heapq
from collections.abc import Iterator, Sequence
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
        going: list[tuple[float, int, int]] = []
        length = len(self.ids[0]) + 1
        for rank, (total, parent, place) in enumerate(_best(self._scores, scores)):
            word = words[parent][place]
            if word != self._eos:
                going.append((total, parent, word))
            elif rank < self._width:
                # Ends below the width would not have been explored further either.
                self._finish(total, self.ids[parent], length, stopped=True)
            if len(going) == self._width:
                break
        self._leading = going[0][0]
        rows, copied = _into_rows([parent for _, parent, _ in going])
        going = [going[child] for child in rows]
        parents = [parent for _, parent, _ in going]
        copies = [(parents[row], row, self._alike[row][parents[row]]) for row in copied]
        if copied:
            self._alike = [[read if a == b else self._alike[a][b] for b in parents] for a in parents]
            self.ids = [self.ids[parent].copy() for parent in parents]
        for ids, (_, _, word) in zip(self.ids, going, strict=True):
            ids.append(word)
        self._scores = [total for total, _, _ in going]
        return copies

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


def _best(before: Sequence[float], scores: Sequence[Sequence[float]]) -> Iterator[tuple[float, int, int]]:
    """Continuations from the best on, as (score, parent, place among the parent's); of equals, the first.

    ``before`` are the scores of the parents, ``scores`` what each of their continuations adds, best first.
    """
    heap = [(-(total + row[0]), parent, 0) for parent, (total, row) in enumerate(zip(before, scores, strict=True))]
    heapq.heapify(heap)
    while heap:
        total, parent, place = heap[0]
        yield -total, parent, place
        place += 1
        if place < len(scores[parent]):
            heapq.heapreplace(heap, (-(before[parent] + scores[parent][place]), parent, place))
        else:
            heapq.heappop(heap)


def _into_rows(parents: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which of the chosen continuations goes into each row, where continuation i is a child of row ``parents[i]``; and
    the rows that a further child of another row gets. The first child of a row stays there."""
    places: dict[int, int] = {}
    further = []
    for child, parent in enumerate(parents):
        if places.setdefault(parent, child) != child:
            further.append(child)
    free = [row for row in range(len(parents)) if row not in places]
    places |= dict(zip(free, further, strict=True))
    return [places[row] for row in range(len(parents))], free
