"""Beam search over small languages of which every text is known."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.engine.beams import Beams, Copy, Hypothesis

EOS = 0
WORDS = 4

Language = dict[tuple[int, ...], NDArray[np.float32]]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def language(seed: int) -> Language:
    """Log probabilities of the next word after every text of up to three words."""
    random = np.random.default_rng(seed)
    texts = [text for length in range(4) for text in itertools.product(range(1, WORDS), repeat=length)]
    return {text: log_softmax(2 * random.standard_normal(WORDS).astype(np.float32)) for text in texts}


class Searches:
    """Beams whose rows hold what they have read, copied as ``Beams`` says."""

    def __init__(self, width: int) -> None:
        self.beams = Beams(width, EOS)
        self.width = width
        self.rows: list[list[int]] = []
        self.languages: list[Language] = []
        self.over: dict[int, Hypothesis] = {}

    def join(self, language: Language, max_tokens: int, penalty: float = 1.0) -> None:
        self.beams.join(max_tokens, penalty)
        self.languages.append(language)
        self.rows += [[] for _ in range(self.width)]

    def leave(self, text: int) -> None:
        self.beams.leave(text)
        last = len(self.languages) - 1
        for row in range(self.width):
            self.rows[text * self.width + row] = self.rows[last * self.width + row]
        self.languages[text] = self.languages[last]
        self.languages.pop()
        del self.rows[last * self.width :]

    def texts(self, text: int) -> list[tuple[int, ...]]:
        return [tuple(ids) for ids in self.beams.written(text)]

    def step(self, given: Sequence[NDArray[np.float32]] | None = None) -> list[Copy]:
        """Read a word, rank by the language (or ``given`` rows), choose."""
        if given is None:
            given = [
                self.languages[row // self.width][self.texts(row // self.width)[row % self.width]]
                for row in range(len(self.rows))
            ]
        log_probabilities = np.stack(given)
        words = np.argsort(-log_probabilities, axis=1, kind="stable")[:, : 2 * self.width]
        scores = np.take_along_axis(log_probabilities, words, 1)
        read = [len(self.rows[text * self.width]) for text in range(len(self.languages))]
        copies, self.over = self.beams.advance(0, scores, words, read)
        for copy in copies:
            source, target = self.rows[copy.source], self.rows[copy.target]
            assert target[: copy.start] == source[: copy.start]
            self.rows[copy.target] = list(source)
        return copies

    def read(self) -> None:
        """Let every row read its text's last word; what it has read then is its text."""
        for row, word in zip(self.rows, self.beams.next_ids, strict=True):
            row.append(word)
        for text in range(len(self.languages)):
            rows = self.rows[text * self.width : (text + 1) * self.width]
            assert [tuple(row) for row in rows] == self.texts(text)


def search(after: Language, width: int, penalty: float, max_tokens: int) -> Hypothesis:
    searches = Searches(width)
    searches.join(after, max_tokens, penalty)
    while True:
        searches.step()
        if searches.over:
            return searches.over[0]
        searches.read()


def all_texts(after: Language, penalty: float, max_tokens: int) -> dict[tuple[int, ...], float]:
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


def key(found: Hypothesis) -> tuple[int, ...]:
    return found.ids if found.stopped else (*found.ids, -1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_wide_enough_for_everything_finds_the_best_text(seed: int, penalty: float) -> None:
    after = language(seed)
    # Room for all 27 texts of three words, so that none is lost on the way.
    scores = all_texts(after, penalty, max_tokens=3)
    best = search(after, 27, penalty, 3)
    assert key(best) == max(scores, key=scores.__getitem__)
    assert best.score == pytest.approx(scores[key(best)], rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 3])
def test_a_score_is_that_of_its_text(seed: int, width: int) -> None:
    after = language(seed)
    best = search(after, width, 1.0, 3)
    assert best.score == pytest.approx(all_texts(after, 1.0, 3)[key(best)], rel=1e-5)


def test_an_end_that_ranks_below_the_width_counts_for_nothing() -> None:
    beams = Beams(2, EOS)
    beams.join(9, 1.0)

    def advance(*rows: dict[int, float]) -> dict[int, Hypothesis]:
        words, scores = [list(row) for row in rows], [list(row.values()) for row in rows]
        return beams.advance(0, np.array(scores, np.float32), np.array(words), [len(beams.written(0)[0])])[1]

    unlikely = {1: -5.0, 2: -5.1, 3: -5.2, EOS: -9.0}
    assert not advance({1: -1.0, 2: -1.05, 3: -7.0, EOS: -8.0}, unlikely)
    # An end, a word, an end and a word: the second end is the third of all.
    assert not advance({EOS: -0.1, 1: -0.2, 2: -7.0, 3: -8.0}, {EOS: -0.2, 2: -0.3, 1: -7.0, 3: -8.0})
    assert beams.written(0) == [[1, 1], [2, 2]]
    # So one text has ended and not two, though both were likelier than any that goes on now.
    assert not advance(unlikely, unlikely)


@given(st.lists(st.one_of(st.integers(0, 40), st.integers(-9, -1)), max_size=25), st.integers(2, 4))
def test_searches_side_by_side_find_what_each_finds_alone(events: list[int], width: int) -> None:
    """Positive: a search of that seed joins; negative: one leaves before its end. Rows read, and copies are right."""
    searches = Searches(width)
    seeds: list[int] = []
    for event in [*events, *[-100] * 12]:
        if event >= 0 and len(seeds) < 4:
            searches.join(language(event), max_tokens=1 + event % 3)
            seeds.append(event)
        elif -100 < event < 0 and seeds:
            place = event % len(seeds)
            searches.leave(place)
            seeds[place] = seeds[-1]
            seeds.pop()
        if not seeds:
            continue
        searches.step()
        ended = sorted(searches.over, reverse=True)
        for place in ended:
            seed = seeds[place]
            assert searches.over[place] == search(language(seed), width, 1.0, 1 + seed % 3)
            searches.leave(place)
            seeds[place] = seeds[-1]
            seeds.pop()
        if seeds:
            searches.read()
    assert not seeds


def fixed(*rows: list[float]) -> list[NDArray[np.float32]]:
    return [np.log(np.array(row, dtype=np.float32)) for row in rows]


def alone(width: int = 2, max_tokens: int = 100, penalty: float = 1.0) -> Searches:
    searches = Searches(width)
    searches.join({}, max_tokens, penalty)
    return searches


def test_the_first_step_counts_one_beam() -> None:
    searches = alone()
    assert searches.step(fixed([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])) == [Copy(0, 1, 0)]
    assert searches.texts(0) == [(3,), (2,)]


def test_only_what_differs_is_copied() -> None:
    searches = alone(width=3)
    even = [0.1, 0.2, 0.3, 0.4]
    assert searches.step(fixed(even, even, even)) == [Copy(0, 1, 0), Copy(0, 2, 0)]
    searches.read()
    # Row 1 dies; a further child of row 0 takes its place, and both have read nothing alike yet.
    sure = [1e-9, 1e-9, 0.5, 0.5]
    assert searches.step(fixed(sure, [1e-9] * 4, [1e-9, 1e-9, 1e-9, 1.0])) == [Copy(0, 1, 0)]
    searches.read()
    # Rows 0 and 1 have the first word alike.
    assert searches.step(fixed(sure, [1e-9] * 4, [1e-9, 1e-9, 1e-9, 1.0])) == [Copy(0, 1, 1)]


def test_the_search_ends_early_when_nothing_unfinished_scores_better() -> None:
    searches = alone()
    searches.step(fixed([0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.4, 0.4]))
    assert not searches.over
    searches.step(fixed([0.97, 0.01, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]))
    assert searches.over[0].ids == (2,) and searches.over[0].stopped


def test_the_length_penalty_chooses_between_short_and_long() -> None:
    def best(penalty: float) -> tuple[int, ...]:
        searches = alone(max_tokens=3, penalty=penalty)
        searches.step(fixed([0.5, 0.5, 1e-9, 1e-9], [0.5, 0.5, 1e-9, 1e-9]))
        going = searches.texts(0).index((1,))
        none = [1e-9, 1e-9, 1e-9, 1e-9]
        searches.step(fixed(*([none] * going), [1e-9, 0.9, 0.1, 1e-9], *([none] * (1 - going))))
        going = searches.texts(0).index((1, 1))
        searches.step(fixed(*([none] * going), [0.9, 0.1, 1e-9, 1e-9], *([none] * (1 - going))))
        return searches.over[0].ids

    assert best(0.0) == ()  # log 0.5 against log 0.405
    assert best(1.0) == (1, 1)


def test_an_end_that_is_not_among_the_best_is_not_explored() -> None:
    searches = alone(max_tokens=1)
    searches.step(fixed([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]))
    assert searches.over[0].ids == (3,) and not searches.over[0].stopped


def test_without_an_end_of_text_every_word_is_one() -> None:
    beams = Beams(2, None)
    beams.join(5, 1.0)
    even = np.log(np.full((2, 4), 0.25, dtype=np.float32))
    beams.advance(0, even, np.array([[0, 1, 2, 3]] * 2), [0])
    assert sorted(beams.written(0)) == [[0], [1]]
