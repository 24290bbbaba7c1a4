"""The door lets in as many texts as it has places for."""

import pytest

from service.door import Door
from service.engine.types import Overloaded


def test_places_are_given_back_however_a_request_ends() -> None:
    door = Door(limit=2)
    with door.admit(2):
        assert door.inside == 2
    with pytest.raises(RuntimeError), door.admit(1):
        raise RuntimeError
    assert door.inside == 0


def test_a_full_door_refuses_all_of_a_list_and_says_when_to_return() -> None:
    door = Door(limit=4)
    with door.admit(3):
        with pytest.raises(Overloaded) as one, door.admit(2):
            raise AssertionError("let in")
        with pytest.raises(Overloaded) as three, door.admit(4):
            raise AssertionError("let in")
        assert door.inside == 3
        # Three times as many must leave first.
        assert three.value.retry_after_s == pytest.approx(3 * one.value.retry_after_s)
        with door.admit(1):
            assert door.inside == 4
