"""Daily budgets on a clock that is moved by hand."""

from energy.budget import EVERYONE, DailyBudgets, Standing
from tests.energy.fakes import HeldClock

DAY_S = 86_400
NOON_S = 20_000 * DAY_S + DAY_S / 2


def test_a_day_ends_at_midnight_of_utc() -> None:
    held = HeldClock(wall_s=NOON_S)
    budgets = DailyBudgets({EVERYONE: 1000}, held.clock)
    budgets.spend(EVERYONE, 400, NOON_S - 10)
    assert budgets.standing(EVERYONE) == Standing(1000, 400, DAY_S / 2)
    budgets.spend(EVERYONE, 600, NOON_S)
    standing = budgets.standing(EVERYONE)
    assert standing is not None and standing.is_spent
    held.wall_s = NOON_S + DAY_S / 2
    assert budgets.standing(EVERYONE) == Standing(1000, 0, DAY_S)
    assert budgets.day_began_s == NOON_S + DAY_S / 2


def test_what_was_spent_on_another_day_does_not_count() -> None:
    held = HeldClock(wall_s=NOON_S)
    budgets = DailyBudgets({EVERYONE: 1000}, held.clock)
    budgets.spend(EVERYONE, 700, NOON_S - DAY_S)
    held.wall_s += DAY_S
    # A bill that ended before midnight and is settled after it.
    budgets.spend(EVERYONE, 700, NOON_S)
    assert budgets.standing(EVERYONE) == Standing(1000, 0, DAY_S / 2)


def test_every_key_has_its_own() -> None:
    budgets = DailyBudgets({"a": 100, "b": 100}, HeldClock(wall_s=NOON_S).clock)
    budgets.spend("a", 150, NOON_S)
    budgets.spend("stranger", 150, NOON_S)
    assert budgets.standing("a") == Standing(100, 150, DAY_S / 2)
    assert budgets.standing("b") == Standing(100, 0, DAY_S / 2)
    assert budgets.standing("stranger") is None
