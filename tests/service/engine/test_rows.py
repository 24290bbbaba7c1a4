"""Rows of the buffers: the live ones are always the first, and everybody keeps what is theirs."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.rows import Move, Rows, continue_rows


class Owner:
    def __init__(self, name: int) -> None:
        self.name = name
        self.rows: list[int] = []


def test_first_rows_are_neighbours() -> None:
    rows: Rows[Owner] = Rows(8)
    owners = [Owner(0), Owner(1), Owner(2)]
    rows.join(owners, [1, 3, 2])
    assert [owner.rows for owner in owners] == [[0], [1, 3, 4], [2, 5]]
    assert (rows.used, rows.free, rows.owners) == (6, 2, owners)


def test_the_last_row_moves_into_a_freed_place() -> None:
    rows: Rows[Owner] = Rows(4)
    owners = [Owner(0), Owner(1), Owner(2)]
    rows.join(owners, [1, 1, 1])
    assert list(rows.leave(owners[0])) == [Move(2, 0)]
    assert [owner.rows for owner in owners] == [[], [1], [0]]
    assert list(rows.leave(owners[1])) == []
    assert rows.owners == [owners[2]]


@given(st.lists(st.one_of(st.integers(1, 4), st.integers(-20, -1)), max_size=60))
def test_every_row_keeps_its_owners_content(events: list[int]) -> None:
    """Positive: somebody joins with that many rows; negative: somebody leaves. Buffers hold who wrote what."""
    rows: Rows[Owner] = Rows(12)
    buffers: list[tuple[int, int] | None] = [None] * 12
    living: list[Owner] = []
    for number, event in enumerate(events):
        if event > 0:
            if event > rows.free:
                continue
            owner = Owner(number)
            rows.join([owner], [event])
            for part, row in enumerate(owner.rows):
                buffers[row] = (number, part)
            living.append(owner)
        elif living:
            for move in rows.leave(living.pop(event % len(living))):
                assert move.target < move.source
                buffers[move.target] = buffers[move.source]
        assert sorted(row for owner in living for row in owner.rows) == list(range(rows.used))
        assert all(buffers[row] == (owner.name, part) for owner in living for part, row in enumerate(owner.rows))
        assert {owner.name for owner in rows.owners} == {owner.name for owner in living}


def test_a_beam_that_goes_on_alone_stays_where_it_is() -> None:
    assert continue_rows([7, 3, 5], [2, 0, 1]) == ([5, 7, 3], [])


def test_a_beam_with_two_children_is_copied_once() -> None:
    assert continue_rows([7, 3, 5], [1, 1, 0]) == ([3, 5, 7], [Move(3, 5)])


@given(st.data())
def test_each_beam_finds_its_parents_content(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 8))
    rows = data.draw(st.permutations(range(width)))
    parents = data.draw(st.lists(st.integers(0, width - 1), min_size=width, max_size=width))
    buffers = {row: beam for beam, row in enumerate(rows)}
    places, moves = continue_rows(rows, parents)
    for move in moves:
        buffers[move.target] = buffers[move.source]
    assert sorted(places) == sorted(rows)
    assert [buffers[place] for place in places] == parents
    assert len(moves) == width - len(set(parents))
