"""Conservation from outside: what adds up, what leaks, what is still open."""

import pytest

from loadtests.balance import Scrape, balance, read_scrape
from tests.loadtests.fakes import sample


def exposition(settled: float, attributed: float, idle: float, open_j: float = 0.0) -> str:
    return (
        "# HELP wattle_meter_energy_joules_total Energy.\n# TYPE wattle_meter_energy_joules_total counter\n"
        f'wattle_meter_energy_joules_total{{device="cpu",source="powercap"}} {settled - 1}\n'
        'wattle_meter_energy_joules_total{device="dram",source="powercap"} 1\n'
        f'wattle_energy_residual_joules{{device="cpu"}} {open_j}\n'
        f'wattle_attributed_energy_joules_total{{device="cpu",model="m"}} {attributed}\n'
        f'wattle_unattributed_energy_joules_total{{device="cpu",reason="idle"}} {idle}\n'
    )


def scrape(*figures: float) -> Scrape:
    found = read_scrape(exposition(*figures))
    assert found
    return found


def test_a_scrape_sums_devices() -> None:
    found = read_scrape(exposition(30.0, 10.0, 20.0, 2.0))
    assert found and (found.settled_j, found.meter_j, found.attributed_j) == (30.0, 32.0, 10.0)
    assert (found.unattributed_j, found.sources) == ({"idle": 20.0}, ("powercap",))


def test_a_server_without_the_account_has_no_scrape() -> None:
    assert read_scrape("# nothing\nother_total 3\n") is None


def test_bills_and_rest_make_the_meter() -> None:
    before, after = scrape(30.0, 10.0, 20.0), scrape(50.0, 14.0, 36.0)
    found = balance(before, after, after, [sample(allocated_j=1.5), sample(allocated_j=2.5, error="504: deadline")])
    assert (found.meter_j, found.bills_j, found.rest_j, found.residual_j) == (20.0, 4.0, {"idle": 16.0}, 0.0)
    assert found.holds


@pytest.mark.parametrize(("billed", "holds"), [(3.9, True), (3.7, False), (4.3, False)])
def test_more_than_a_hundredth_is_an_alarm(billed: float, holds: bool) -> None:
    before, after = scrape(30.0, 10.0, 20.0), scrape(50.0, 14.0, 36.0)
    found = balance(before, after, after, [sample(allocated_j=billed)])
    assert found.residual_share == pytest.approx((4 - billed) / 20)
    assert found.holds is holds


def test_a_meter_that_stands_still_accounts_for_nothing() -> None:
    before = scrape(30.0, 10.0, 20.0)
    found = balance(before, before, before, [sample(allocated_j=None)])
    assert found.residual_share is None and not found.holds


def test_energy_that_is_not_assigned_yet_is_shown() -> None:
    before, ended, after = scrape(30.0, 10.0, 20.0), scrape(30.0, 10.0, 20.0, 8.0), scrape(35.0, 10.0, 25.0, 9.0)
    assert balance(before, ended, after, []).open_j == 3.0
