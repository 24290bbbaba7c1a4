"""Whose turn it is, as properties: for any keys, any lengths and any order of coming."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.fairness import Turns


@dataclass(frozen=True)
class Text:
    number: int
    key: str
    tokens: int


LONGEST = 50
ARRIVALS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, LONGEST)), max_size=60)


def texts(arrivals: Sequence[tuple[str, int]]) -> list[Text]:
    return [Text(number, key, tokens) for number, (key, tokens) in enumerate(arrivals)]


def serve(turns: Turns, waiting: list[Text], most: int) -> list[Text]:
    """A step of a server that takes whose turn it is."""
    taken = turns.first(waiting, most)
    for text in taken:
        waiting.remove(text)
        turns.charge(text.key, text.tokens)
    return taken


@given(ARRIVALS, st.integers(1, 80))
def test_nothing_is_lost_and_those_of_one_key_stay_in_order(arrivals: list[tuple[str, int]], most: int) -> None:
    waiting = texts(arrivals)
    chosen = Turns().first(waiting, most)
    assert len(chosen) == min(most, len(waiting))
    for key in "abc":
        own = [text for text in waiting if text.key == key]
        taken = [text for text in chosen if text.key == key]
        assert taken == own[: len(taken)]


@given(st.lists(st.integers(1, LONGEST), max_size=60), st.integers(1, 80))
def test_one_key_is_served_as_it_comes(lengths: list[int], most: int) -> None:
    waiting = texts([("", length) for length in lengths])
    assert Turns().first(waiting, most) == waiting[:most]


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(1, LONGEST), min_size=1, max_size=8), min_size=2),
    st.integers(1, 6),
)
def test_keys_that_always_wait_get_the_same(lengths: dict[str, list[int]], most: int) -> None:
    """However long their texts: nobody is ahead by more than what one step takes."""
    turns, served, numbers = Turns(), Counter(dict.fromkeys(lengths, 0)), itertools.count()
    endless = {key: itertools.cycle(tokens) for key, tokens in lengths.items()}
    waiting: list[Text] = []
    for _ in range(60):
        for key, source in endless.items():
            turns.join(key, {text.key for text in waiting})
            while sum(text.key == key for text in waiting) <= most:
                waiting.append(Text(next(numbers), key, next(source)))
        for text in serve(turns, waiting, most):
            served[text.key] += text.tokens
        assert max(served.values()) - min(served.values()) <= LONGEST


@given(st.integers(1, 500), st.integers(1, LONGEST), st.integers(0, 40))
def test_a_single_request_goes_before_the_rest_of_a_burst(burst: int, tokens: int, steps: int) -> None:
    turns = Turns()
    turns.join("a", ())
    waiting = texts([("a", tokens)] * burst)
    for _ in range(min(steps, burst - 1)):
        serve(turns, waiting, 1)
    turns.join("b", {"a"})
    single = Text(burst, "b", tokens)
    waiting.append(single)
    assert single in turns.first(waiting, 2)


def test_waiting_for_nothing_earns_no_credit() -> None:
    turns = Turns()
    turns.join("a", ())
    waiting = texts([("a", 10)] * 100)
    for _ in range(50):
        serve(turns, waiting, 1)
    # Who comes only now does not get what others had meanwhile.
    turns.join("b", {"a"})
    waiting += texts([("b", 10)] * 50)
    first = [text.key for text in turns.first(waiting, 20)]
    assert first.count("b") == 10


def test_what_was_written_counts_too() -> None:
    turns = Turns()
    for key in "ab":
        turns.join(key, () if key == "a" else {"a"})
    turns.charge("a", 100)
    waiting = texts([("a", 10), *[("b", 10)] * 20])
    assert [text.key for text in turns.first(waiting, 11)] == ["b"] * 10 + ["a"]


def test_where_nobody_waits_nobody_is_behind() -> None:
    turns = Turns()
    turns.join("a", ())
    turns.charge("a", 1000)
    turns.join("b", ())
    turns.join("a", {"b"})
    assert [text.key for text in turns.first(texts([("a", 1), ("b", 1)]), 2)] == ["a", "b"]
