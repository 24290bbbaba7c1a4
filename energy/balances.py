"""What open requests have been charged, as one table of numbers. Knows nothing of steps, meters or bills."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from energy.types import Phase, Places, Quality

Numbers = NDArray[np.int64]
Rows = NDArray[np.intp]
_RANK, _TIME, _FIRST = range(3)
"""Columns: how weak a quality is, time on executors; from the last on energy by what it is for."""
_QUALITIES = (None, *Quality)
"""By rank; of whom nothing was charged it is 0."""
_RANKS = {quality: rank for rank, quality in enumerate(_QUALITIES)}
_MOST_BITS = 60


class Charged(NamedTuple):
    """What energy is for."""

    device: str
    phase: Phase
    model: str
    quality: Quality
    is_active: bool
    """Whether it is energy above idle."""


class Costs(NamedTuple):
    """What requests were charged that have a quality and places in common."""

    numbers: Rows
    """Which of those that were asked for; the rows of what follows."""
    quality: Quality | None
    """None where nothing has been charged."""
    places: Places
    parts_uj: Numbers
    """``(requests, places)``, none of it 0."""
    active_uj: Numbers
    """Above idle, of all places together."""
    times_ns: Numbers
    """On executors."""

    @property
    def allocated_uj(self) -> Numbers:
        """Of all places together."""
        sums_uj: Numbers = self.parts_uj.sum(1)
        return sums_uj


class _RowOf(dict[str, int]):
    """The row of each open request: who has none yet gets one by being looked up."""

    def __init__(self) -> None:
        self.free: list[int] = []
        self.count = 1
        """The first row stays empty: it is that of whoever has none."""

    def __missing__(self, name: str) -> int:
        if self.free:
            row = self.free.pop()
        else:
            row, self.count = self.count, self.count + 1
        self[name] = row
        return row


class Balances:
    """A row for each open request that has been charged, a column for each thing to charge for."""

    def __init__(self) -> None:
        self._row_of = _RowOf()
        self._numbers: Numbers = np.zeros((1, _FIRST), np.int64)
        self._columns: dict[Charged, int] = {}
        self._forms: dict[tuple[int, ...], _Form] = {}

    def open(self, names: Iterable[str]) -> Rows:
        """The rows of these requests, which are open from now on."""
        rows = np.array(list(map(self._row_of.__getitem__, names)), np.intp)
        missing = self._row_of.count - len(self._numbers)
        if missing > 0:
            # At least twice as many, so that it is seldom done.
            self._numbers = np.pad(self._numbers, ((0, max(missing, len(self._numbers))), (0, 0)))
        return rows

    def rows(self, names: Iterable[str]) -> Rows:
        """The rows of these requests, the empty one of those that were never charged."""
        return np.array(list(map(self._row_of.get, names, repeat(0))), np.intp)

    def row(self, name: str) -> int:
        """That of one of them."""
        return self._row_of.get(name, 0)

    def charge(self, whose: Sequence[Rows], charged: Sequence[Charged], shares_uj: Numbers) -> None:
        """Charge each of some rows for what stands in the same place of ``charged``; the shares of one stand behind
        those of the other."""
        columns = np.repeat([self._column(each) for each in charged], [len(rows) for rows in whose])
        # Flat, as NumPy has a faster way with a single index.
        np.add.at(self._numbers.reshape(-1), np.concatenate(whose) * self._numbers.shape[1] + columns, shares_uj)

    def occupy(self, whose: Sequence[Rows], shares_ns: Numbers) -> None:
        """Each of some was on executors for so long."""
        np.add.at(self._numbers[:, _TIME], np.concatenate(whose), shares_ns)

    def know(self, rows: Rows, quality: Quality) -> None:
        """What was charged in these rows is known no better than so."""
        self._numbers[rows, _RANK] = np.maximum(self._numbers[rows, _RANK], _RANKS[quality])

    def find(self, name: str) -> Costs:
        """What a request has been charged so far."""
        (costs,) = self.costs(self._numbers[[self.row(name)]])
        return costs

    def allocated_uj(self, name: str) -> tuple[int, Quality | None]:
        """The sum of that alone, and its quality."""
        row = self._numbers[self.row(name)].tolist()
        return sum(row[_FIRST:]), _QUALITIES[row[_RANK]]

    def take(self, names: Iterable[str]) -> Numbers:
        """The rows ``(names, columns)`` of requests that are no longer open."""
        rows = list(map(self._row_of.pop, names, repeat(0)))
        numbers = self._numbers[rows]
        self._numbers[rows] = 0
        self._row_of.free += filter(None, rows)
        return numbers

    def costs(self, numbers: Numbers) -> Iterator[Costs]:
        """What such rows say, those that are alike together."""
        energies_uj = numbers[:, _FIRST:]
        used = tuple(np.flatnonzero(energies_uj.any(0)).tolist())
        form = self._forms.get(used) or self._forms.setdefault(used, _Form(used, list(self._columns)))
        parts_uj, active_uj = form.parts_uj(energies_uj), energies_uj[:, form.active].sum(1)
        for some, rank, has in _alike(numbers[:, _RANK], parts_uj != 0):
            own_uj = parts_uj[some][:, list(has)]
            times_ns = numbers[some, _TIME]
            yield Costs(some, _QUALITIES[rank], form.places(has), own_uj, active_uj[some], times_ns)

    def by_charged(self, numbers: Numbers) -> Iterator[tuple[Charged, int]]:
        """The energy in one such row, or in a sum of some."""
        return zip(self._columns, numbers[_FIRST:].tolist(), strict=False)

    def sums(self) -> Iterator[tuple[Charged, int]]:
        """The energy in all rows."""
        return self.by_charged(self._numbers.sum(0))

    def _column(self, charged: Charged) -> int:
        if charged not in self._columns:
            self._columns[charged] = self._numbers.shape[1]
            self._numbers = np.pad(self._numbers, ((0, 0), (0, 1)))
        return self._columns[charged]


def _alike(ranks: Numbers, has: NDArray[np.bool_]) -> Iterator[tuple[Rows, int, tuple[bool, ...]]]:
    """The numbers of rows that are alike, with what they have in common."""
    # One number of each row, as NumPy takes long to compare whole rows; Python's own where 64 bits are too few.
    bits = has.shape[1]
    places = 2 ** np.arange(bits, dtype=np.int64 if bits < _MOST_BITS else np.object_)
    codes = ranks.astype(places.dtype) * 2**bits + has @ places
    for code in np.unique(codes):
        numbers = np.flatnonzero(codes == code)
        first = numbers[0]
        yield numbers, int(ranks[first]), tuple(has[first].tolist())


class _Form:
    """How the energies in some columns, and nowhere else, make bills."""

    def __init__(self, used: Sequence[int], charged: Sequence[Charged]) -> None:
        places = {column: (charged[column].device, charged[column].phase) for column in used}
        self.active = [column for column in used if charged[column].is_active]
        self._columns = sorted(used, key=places.__getitem__)
        self._all = sorted(set(places.values()))
        along = [places[column] for column in self._columns]
        self._firsts = [along.index(place) for place in self._all]
        """Where the columns of each place begin."""
        self._some: dict[tuple[bool, ...], Places] = {}
        """By which of the places have energy."""

    def parts_uj(self, energies_uj: Numbers) -> Numbers:
        """What each row has at each place."""
        if not self._columns:
            return energies_uj[:, :0]
        sums_uj: Numbers = np.add.reduceat(energies_uj[:, self._columns], self._firsts, axis=1)
        return sums_uj

    def places(self, has: tuple[bool, ...]) -> Places:
        """Those of them that have energy."""
        if has not in self._some:
            self._some[has] = Places(compress(self._all, has))
        return self._some[has]
