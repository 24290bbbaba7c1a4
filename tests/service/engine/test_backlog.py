"""What may wait, and how long it will."""

import pytest

from service.engine.backlog import Backlog
from service.engine.types import Overloaded


def test_items_and_tokens_are_limited_together_or_not_at_all() -> None:
    backlog = Backlog(max_items=4, max_tokens=100)
    backlog.enter(3, 60)
    with pytest.raises(Overloaded):
        backlog.enter(2, 1)
    with pytest.raises(Overloaded):
        backlog.enter(1, 41)
    assert (backlog.items, backlog.tokens) == (3, 60)
    backlog.enter(1, 40)
    backlog.leave(2, 50)
    assert (backlog.items, backlog.tokens) == (2, 50)


def test_what_is_larger_than_the_limits_may_come_when_nobody_waits() -> None:
    backlog = Backlog(max_items=4, max_tokens=100)
    backlog.enter(5, 1000)
    with pytest.raises(Overloaded):
        backlog.enter(1, 1)


def test_the_wait_follows_the_measured_speed() -> None:
    backlog = Backlog(max_items=10, max_tokens=1000)
    assert backlog.wait_s() == 1.0
    backlog.enter(5, 600)
    backlog.stepped(100, 0.5)
    assert backlog.wait_s() == pytest.approx(3.0)
    for _ in range(400):
        backlog.stepped(100, 0.1)
    assert backlog.wait_s() == pytest.approx(0.6, rel=0.01)
    backlog.stepped(0, 1e6)
    assert backlog.wait_s() == 60.0
    backlog.leave(5, 600)
    assert backlog.wait_s() == 0.1


def test_the_wait_is_what_the_caller_is_told() -> None:
    backlog = Backlog(max_items=1, max_tokens=1000)
    backlog.enter(1, 300)
    backlog.stepped(100, 1.0)
    with pytest.raises(Overloaded) as refusal:
        backlog.enter(1, 1)
    assert refusal.value.retry_after_s == pytest.approx(3.0)


def test_a_key_may_fill_its_share_and_no_more() -> None:
    backlog = Backlog(max_items=10, max_tokens=100, key_share=0.5)
    backlog.enter(5, 10, "a")
    with pytest.raises(Overloaded):
        backlog.enter(1, 1, "a")
    backlog.enter(1, 45, "b")
    with pytest.raises(Overloaded):
        backlog.enter(1, 10, "b")
    assert backlog.by_key == {"a": (5, 10), "b": (1, 45)}
    # What finds none of its key may come, within the limits of all.
    backlog.enter(4, 40, "c")
    with pytest.raises(Overloaded):
        backlog.enter(1, 1, "d")
    backlog.leave(5, 10, "a")
    assert backlog.by_key.keys() == {"b", "c"} and backlog.items == 5
