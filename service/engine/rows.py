"""Which rows of the buffers belong to whom: pure bookkeeping. The rows in use are always the first ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Owner(Protocol):
    """Who occupies rows; ``rows`` lists them in the owner's own order."""

    rows: list[int]


OwnerT = TypeVar("OwnerT", bound=Owner)


@dataclass(frozen=True, slots=True)
class Move:
    """What lies in ``source`` has to be copied to ``target``."""

    source: int
    target: int


class Rows(Generic[OwnerT]):
    """Rows ``0 .. used - 1`` are occupied."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._owners: list[OwnerT] = []
        """The owner of each row in use."""

    @property
    def used(self) -> int:
        """How many rows are occupied."""
        return len(self._owners)

    @property
    def free(self) -> int:
        """How many more rows can be occupied."""
        return self.capacity - self.used

    @property
    def owners(self) -> list[OwnerT]:
        """Each owner once, by its lowest row."""
        return list(dict.fromkeys(self._owners))

    def join(self, owners: Sequence[OwnerT], rows_each: Sequence[int]) -> None:
        """Give each of ``owners`` its rows behind those in use: first one to each, in order, then the others."""
        if sum(rows_each) > self.free:
            raise ValueError(f"{sum(rows_each)} rows wanted, {self.free} are free")
        firsts = list(owners)
        others = [owner for owner, count in zip(owners, rows_each, strict=True) for _ in range(count - 1)]
        for owner in firsts + others:
            owner.rows.append(self.used)
            self._owners.append(owner)

    def leave(self, owner: OwnerT) -> Iterator[Move]:
        """Free the rows of ``owner``; the last rows in use move into their places. Carry out each move at once."""
        for row in sorted(owner.rows, reverse=True):
            last = self._owners.pop()
            if row < self.used:
                self._owners[row] = last
                last.rows[last.rows.index(self.used)] = row
                yield Move(self.used, row)
        owner.rows = []


def continue_rows(rows: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[Move]]:
    """Let beam i continue beam ``parents[i]``: its new row, and the copies that this takes.

    The first child of a beam keeps its row, so only further children are copied, into the rows of beams that no
    child continues.
    """
    places: list[int | None] = [None] * len(rows)
    kept: set[int] = set()
    for beam, parent in enumerate(parents):
        if parent not in kept:
            kept.add(parent)
            places[beam] = rows[parent]
    ended = iter([row for beam, row in enumerate(rows) if beam not in kept])
    moves = []
    for beam, parent in enumerate(parents):
        if places[beam] is None:
            moves.append(Move(rows[parent], next(ended)))
            places[beam] = moves[-1].target
    return [place for place in places if place is not None], moves
