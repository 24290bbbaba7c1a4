"""Daily budgets on a clock that is moved by hand."""

from energy.budget import EVERYONE, DailyBudgets, Standing
from energy.carbon import Carbon
from energy.types import Bill, Bills, Quality, RequestRecord, SettledRecord
from tests.energy.fakes import HeldClock

DAY_S = 86_400
NOON_S = 20_000 * DAY_S + DAY_S / 2


def test_a_day_ends_at_midnight_of_utc() -> None:
    held = HeldClock(wall_s=NOON_S)
    budgets = DailyBudgets(held.clock)
    budgets.spend(EVERYONE, 400, NOON_S - 10)
    assert budgets.standing(EVERYONE, 1000) == Standing(1000, 400, DAY_S / 2)
    budgets.spend(EVERYONE, 600, NOON_S)
    assert budgets.standing(EVERYONE, 1000).is_spent
    held.wall_s = NOON_S + DAY_S / 2
    assert budgets.standing(EVERYONE, 1000) == Standing(1000, 0, DAY_S)
    assert budgets.day_began_s == NOON_S + DAY_S / 2


def test_what_was_spent_on_another_day_does_not_count() -> None:
    held = HeldClock(wall_s=NOON_S)
    budgets = DailyBudgets(held.clock)
    budgets.spend(EVERYONE, 700, NOON_S - DAY_S)
    held.wall_s += DAY_S
    # A bill that ended before midnight and is settled after it.
    budgets.spend(EVERYONE, 700, NOON_S)
    assert budgets.standing(EVERYONE, 1000) == Standing(1000, 0, DAY_S / 2)


def test_every_key_has_its_own_and_counts_for_everyone() -> None:
    budgets = DailyBudgets(HeldClock(wall_s=NOON_S).clock)
    for key, energy_uj in (("a", 150), ("b", 20), (None, 3), ("b", None)):
        request = RequestRecord("req-1", "sentiment", "tiny", "ok", key=key)
        bill = Bill("req-1", energy_uj, energy_uj, None, Quality.ESTIMATED, settled=True)
        budgets.settled([Bills.of(SettledRecord(request, bill, NOON_S, Carbon("DEU").assumptions))])
    assert budgets.standing("a", 100) == Standing(100, 150, DAY_S / 2)
    assert budgets.standing("b", 100) == Standing(100, 20, DAY_S / 2)
    assert budgets.standing(EVERYONE, 100) == Standing(100, 173, DAY_S / 2)
