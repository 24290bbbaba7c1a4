"""What open requests have been charged, as one table of numbers. Knows nothing of steps, meters or bills."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from energy.types import Parts, Phase, Places, Quality

Numbers = NDArray[np.int64]
Rows = NDArray[np.intp]
_RANK, _TIME, _FIRST = range(3)
"""Columns: how weak a quality is, time on executors; from the last on energy by what it is for."""
_QUALITIES = (None, *Quality)
"""By rank; of whom nothing was charged it is 0."""
_RANKS = {quality: rank for rank, quality in enumerate(_QUALITIES)}


class Charged(NamedTuple):
    """What energy is for."""

    device: str
    phase: Phase
    model: str
    quality: Quality
    is_active: bool
    """Whether it is energy above idle."""


Cost = tuple[Parts, int, int, int, Quality | None]
"""One request's: parts, their sum, the active energy among that (in microjoules), time on executors (in nanoseconds),
and a quality, None as long as nothing has been charged. Plain, as there is one for every request."""


class Balances:
    """A row for each open request that has been charged, a column for each thing to charge for."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._free: list[int] = []
        # The first row stays empty: it is that of whoever has none.
        self._numbers: Numbers = np.zeros((1, _FIRST), np.int64)
        self._columns: dict[Charged, int] = {}
        self._forms: dict[tuple[int, ...], _Form] = {}

    def rows_of(self, names: Collection[str]) -> Rows:
        """The rows of these requests, which are open from now on."""
        rows = self._rows
        for name in names:
            if name not in rows:
                if not self._free:
                    self._grow()
                rows[name] = self._free.pop()
        return np.array([rows[name] for name in names], np.intp)

    def charge(self, whose: Sequence[Rows], charged: Sequence[Charged], shares_uj: Numbers) -> None:
        """Charge each of some rows for what stands in the same place of ``charged``; the shares of one stand behind
        those of the other."""
        columns = np.repeat([self._column(each) for each in charged], [len(rows) for rows in whose])
        np.add.at(self._numbers, (np.concatenate(whose), columns), shares_uj)

    def occupy(self, whose: Sequence[Rows], shares_ns: Numbers) -> None:
        """Each of some was on executors for so long."""
        np.add.at(self._numbers[:, _TIME], np.concatenate(whose), shares_ns)

    def know(self, rows: Rows, quality: Quality) -> None:
        """What was charged in these rows is known no better than so."""
        self._numbers[rows, _RANK] = np.maximum(self._numbers[rows, _RANK], _RANKS[quality])

    def find(self, name: str) -> Cost:
        """What a request has been charged so far."""
        return self.costs(self._numbers[[self._rows.get(name, 0)]])[0]

    def allocated_uj(self, name: str) -> tuple[int, Quality | None]:
        """The sum of that alone, and its quality."""
        row = self._numbers[self._rows.get(name, 0)].tolist()
        return sum(row[_FIRST:]), _QUALITIES[row[_RANK]]

    def take(self, names: Iterable[str]) -> Numbers:
        """The rows ``(names, columns)`` of requests that are no longer open."""
        rows = [self._rows.pop(name, 0) for name in names]
        numbers = self._numbers[rows]
        self._numbers[rows] = 0
        self._free += filter(None, rows)
        return numbers

    def costs(self, numbers: Numbers) -> list[Cost]:
        """What such rows say; those that are alike go together."""
        energies_uj = numbers[:, _FIRST:]
        used = tuple(np.flatnonzero(energies_uj.any(0)).tolist())
        form = self._forms.get(used) or self._forms.setdefault(used, _Form(used, list(self._columns)))
        ranks, times_ns = numbers[:, :_FIRST].T.tolist()
        allocated_uj, active_uj = energies_uj.sum(1).tolist(), energies_uj[:, form.active].sum(1).tolist()
        qualities = [_QUALITIES[rank] for rank in ranks]
        return list(zip(form.parts(energies_uj), allocated_uj, active_uj, times_ns, qualities, strict=True))

    def by_charged(self, numbers: Numbers) -> Iterator[tuple[Charged, int]]:
        """The energy in one such row, or in a sum of some."""
        return zip(self._columns, numbers[_FIRST:].tolist(), strict=False)

    def sums(self) -> Iterator[tuple[Charged, int]]:
        """The energy in all rows."""
        return self.by_charged(self._numbers.sum(0))

    def _grow(self) -> None:
        """Twice the rows."""
        count = len(self._numbers)
        self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
        self._free += range(2 * count - 1, count - 1, -1)

    def _column(self, charged: Charged) -> int:
        if charged not in self._columns:
            self._columns[charged] = self._numbers.shape[1]
            self._numbers = np.pad(self._numbers, ((0, 0), (0, 1)))
        return self._columns[charged]


class _Form:
    """How the energies in some columns, and nowhere else, make bills."""

    def __init__(self, used: Sequence[int], charged: Sequence[Charged]) -> None:
        places = {column: (charged[column].device, charged[column].phase) for column in used}
        self.active = [column for column in used if charged[column].is_active]
        self._columns = sorted(used, key=places.__getitem__)
        self._all = Places(sorted(set(places.values())))
        along = [places[column] for column in self._columns]
        self._firsts = [along.index(place) for place in self._all.all]
        """Where the columns of each place begin."""
        self._some = {(True,) * len(self._all.all): self._all}
        """By which of the places have energy."""

    def parts(self, energies_uj: Numbers) -> Iterable[Parts]:
        """Of each row; what is nothing is left out."""
        if not self._columns:
            return [Parts(self._all, ())] * len(energies_uj)
        rows_uj = np.add.reduceat(energies_uj[:, self._columns], self._firsts, axis=1)
        if rows_uj.all():
            return [Parts(self._all, row_uj) for row_uj in rows_uj.tolist()]
        return map(self._without_nothing, rows_uj.tolist())

    def _without_nothing(self, row_uj: Sequence[int]) -> Parts:
        has = tuple(map(bool, row_uj))
        if has not in self._some:
            self._some[has] = Places(compress(self._all.all, has))
        return Parts(self._some[has], list(compress(row_uj, has)))
