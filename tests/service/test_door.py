"""The door lets in as many texts as it has places for."""

import pytest

from service.door import Door
from service.engine.types import Overloaded


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_places_are_given_back_however_a_request_ends() -> None:
    door = Door(limit=2)
    with door.admit(2):
        assert door.inside == 2
    with pytest.raises(RuntimeError), door.admit(1):
        raise RuntimeError
    assert door.inside == 0


def wait_s(door: Door, texts: int) -> float:
    """What ``door`` tells whom it refuses."""
    with pytest.raises(Overloaded) as refused, door.admit(texts):
        raise AssertionError("let in")
    return refused.value.retry_after_s


def busy_door(clock: Clock, limit: int, stay_s: float) -> Door:
    """One of whose texts there has been one at a time, for ``stay_s`` each."""
    door = Door(limit, clock=clock)
    for _ in range(1000):
        with door.admit(1):
            clock.now_s += stay_s
    return door


def test_a_full_door_refuses_all_of_a_list_and_says_when_to_return() -> None:
    clock = Clock()
    door = busy_door(clock, limit=4, stay_s=2.0)
    with door.admit(3):
        # Half of the time that three take to leave, and that of one.
        assert wait_s(door, 2) == pytest.approx(3.0 + 2.0)
        assert door.inside == 3
        clock.now_s += 100
        # Three times as many must leave first.
        assert wait_s(door, 4) == pytest.approx(3.0 + 6.0)
        with door.admit(1):
            assert door.inside == 4


def test_what_the_wait_is_measured_by_is_how_many_leave() -> None:
    clock = Clock()
    door = Door(limit=4, clock=clock)
    for _ in range(200):
        # Four stay eight seconds each: one leaves every two seconds.
        with door.admit(1), door.admit(3):
            clock.now_s += 8.0
    with door.admit(4):
        assert wait_s(door, 1) == pytest.approx(4.0 + 2.0)


def test_what_a_nearly_empty_house_says_of_a_full_one_counts_little() -> None:
    clock = Clock()
    door = Door(limit=100, clock=clock)
    with door.admit(1):
        clock.now_s += 60.0
    with door.admit(100):
        assert wait_s(door, 100) < 20.0


def test_those_refused_at_once_are_not_sent_back_at_once() -> None:
    clock = Clock()
    door = busy_door(clock, limit=4, stay_s=1.0)
    with door.admit(4):
        told = [wait_s(door, 1) for _ in range(6)]
    # Nobody is sent further than half the time beyond where all have left.
    assert told == pytest.approx([3, 4, 5, 6, 6, 6])
    clock.now_s += 10
    with door.admit(4):
        assert wait_s(door, 1) == pytest.approx(3)
