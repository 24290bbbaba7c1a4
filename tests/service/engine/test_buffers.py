"""Buffers: what rows hold survives every new layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.buffers import KEY_BLOCK, Buffers, Move

ROWS, HEADS, SIZE, MOST = 4, 2, 3, 100


def token(row: int, position: int) -> float:
    return row * 1000.0 + position + 1


@given(st.lists(st.tuples(st.integers(0, ROWS), st.integers(1, MOST)), max_size=12), st.booleans())
def test_rows_in_use_keep_what_they_hold(events: list[tuple[int, int]], grows: bool) -> None:
    buffers = Buffers(["k", "v"], ROWS, HEADS, SIZE, MOST, grows=grows)
    held = [0] * ROWS
    for used, tokens in events:
        held = [length if row < used else 0 for row, length in enumerate(held)]
        tokens = max(tokens, *held)
        before = {name: array for name, array in buffers.arrays.items()}
        moved = buffers.reserve(tokens, used)
        assert tokens <= buffers.capacity <= -(-MOST // KEY_BLOCK) * KEY_BLOCK
        assert buffers.capacity % (KEY_BLOCK if grows else 4) == 0
        assert moved == any(before[name] is not array for name, array in buffers.arrays.items())
        for sign, array in zip((1, -1), buffers.arrays.values(), strict=True):
            assert array.shape == (ROWS, HEADS, buffers.capacity, SIZE) and array.flags.c_contiguous
            for row in range(used):
                wanted = [sign * token(row, position) for position in range(held[row])]
                assert (array[row, :, : held[row]] == np.array(wanted)[:, None]).all()
            for row in range(ROWS):
                array[row, :, :tokens] = sign * np.array([token(row, position) for position in range(tokens)])[:, None]
        held = [tokens] * ROWS


def test_empty_buffers_shrink() -> None:
    buffers = Buffers(["k"], ROWS, HEADS, SIZE, 1000)
    least = buffers.capacity
    assert buffers.reserve(700, 0) and buffers.capacity >= 700
    assert not buffers.reserve(20, 1)
    assert buffers.reserve(20, 0) and buffers.capacity == least


@pytest.mark.parametrize(("grows", "most"), [(True, 4), (False, 2)])
def test_empty_buffers_that_are_not_much_too_large_stay(grows: bool, most: int) -> None:
    buffers = Buffers(["k"], ROWS, HEADS, SIZE, 1000, grows=grows)
    buffers.reserve(64, 0)
    fitting = buffers.capacity
    assert buffers.reserve(most * fitting * 4 // 5 if grows else most * fitting, 0)
    assert buffers.capacity == most * fitting
    assert not buffers.reserve(64, 0)
    buffers.reserve(900, 0)
    assert buffers.reserve(64, 0) and buffers.capacity == fitting


def test_a_part_of_a_row_is_copied() -> None:
    buffers = Buffers(["k"], ROWS, HEADS, SIZE, MOST)
    [array] = buffers.arrays.values()
    array[0] = 1.0
    buffers.copy([Move(0, 2, 3, 7)])
    assert (array[2, :, 3:7] == 1).all() and array[2].sum() == 4 * HEADS * SIZE
    buffers.put(3, [part[:, 2:] for part in buffers.get(2, 6)])
    assert (array[3, :, 1:4] == 1).all() and array[3].sum() == 3 * HEADS * SIZE
