"""Beginnings of prompts: found again, bounded, and never more than is there."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.engine.prefixes import LEAST_TOKENS, Memory, Prefixes


def memory_of(ids: list[int]) -> Memory:
    """One number for each token, so that a slice says which tokens it stands for."""
    return [np.array(ids, dtype=np.float32).reshape(1, -1, 1)]


def known(prefixes: Prefixes, ids: list[int]) -> list[int]:
    memory = prefixes.find(ids)
    return [int(number) for number in memory[0].reshape(-1)] if memory else []


SYSTEM = list(range(LEAST_TOKENS + 10))


def test_the_longest_beginning_is_found() -> None:
    prefixes = Prefixes(10_000)
    for ids in ([*SYSTEM, 1, 2, 3], [*SYSTEM, 5, 6]):
        prefixes.keep(ids, lambda ids=ids: memory_of(ids))  # type: ignore[misc]
    assert known(prefixes, [*SYSTEM, 5, 7]) == [*SYSTEM, 5]
    # The last token is read whatever is known.
    assert known(prefixes, [*SYSTEM, 5, 6]) == [*SYSTEM, 5]
    assert known(prefixes, SYSTEM) == SYSTEM[:-1]


def test_a_short_beginning_is_not_worth_it() -> None:
    prefixes = Prefixes(10_000)
    prefixes.keep(SYSTEM, lambda: memory_of(SYSTEM))
    assert known(prefixes, SYSTEM[: LEAST_TOKENS - 1] + [99] * 5) == []
    assert known(prefixes, SYSTEM + [99] * len(SYSTEM) * 2) == []


def test_what_was_used_longest_ago_is_forgotten() -> None:
    prompts = [[first] * (LEAST_TOKENS + 8) for first in range(4)]
    prefixes = Prefixes(2 * len(prompts[0]) * 4)
    for ids in prompts[:2]:
        prefixes.keep(ids, lambda ids=ids: memory_of(ids))  # type: ignore[misc]
    assert known(prefixes, prompts[0])
    prefixes.keep(prompts[2], lambda: memory_of(prompts[2]))
    assert [bool(known(prefixes, ids)) for ids in prompts] == [True, False, True, False]


def test_nothing_is_kept_where_nothing_may_be() -> None:
    prefixes = Prefixes(0)
    prefixes.keep(SYSTEM, lambda: memory_of(SYSTEM))
    assert known(prefixes, SYSTEM) == []


@given(st.lists(st.lists(st.integers(0, 1), min_size=LEAST_TOKENS, max_size=LEAST_TOKENS + 4), max_size=12))
def test_what_is_found_always_begins_the_prompt(prompts: list[list[int]]) -> None:
    prefixes = Prefixes(600)
    for ids in prompts:
        found = known(prefixes, ids)
        assert ids[: len(found)] == found and len(found) < len(ids)
        prefixes.keep(ids, lambda ids=ids: memory_of(ids))  # type: ignore[misc]
