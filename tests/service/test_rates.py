"""A key's minute, on a clock that is moved by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rates import Rate
from tests.service.test_keys import Hand


def test_a_minute_is_there_at_once_and_comes_back_steadily() -> None:
    clock = Hand()
    rate = Rate(60, clock)
    assert rate.wait_s(60) == 0
    rate.take(60)
    assert rate.wait_s(1) == pytest.approx(1)
    clock.now_s += 1
    assert rate.wait_s(1) == pytest.approx(0)
    assert rate.wait_s(2) == pytest.approx(1)


def test_what_turned_out_to_be_more_is_paid_by_whoever_comes_next() -> None:
    clock = Hand()
    rate = Rate(60, clock)
    rate.take(90)
    assert rate.wait_s(1) == pytest.approx(31)
    rate.take(-40)
    assert rate.wait_s(10) == 0


def test_what_is_larger_than_a_minute_passes_when_the_minute_is_whole() -> None:
    clock = Hand()
    rate = Rate(60, clock)
    assert rate.wait_s(600) == 0
    rate.take(1)
    assert rate.wait_s(600) == pytest.approx(1)


def test_no_limit_never_waits() -> None:
    rate = Rate(None, Hand())
    rate.take(10**9)
    assert rate.wait_s(10**9) == 0


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 500)), max_size=30),
)
def test_never_more_passes_than_the_time_allows(per_minute: int, steps: list[tuple[float, float]]) -> None:
    """However it is asked: what has passed is at most a minute's worth, the time's, and the last one's debt."""
    clock = Hand()
    rate, began_s, passed = Rate(per_minute, clock), clock.now_s, 0.0
    for pause_s, amount in steps:
        clock.now_s += pause_s
        if rate.wait_s(amount) == 0:
            passed += amount
            rate.take(amount)
            allowed = per_minute * (1 + (clock.now_s - began_s) / 60)
            assert passed <= allowed + max(0.0, amount - per_minute) + 1e-6 or amount > per_minute
