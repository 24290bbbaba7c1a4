"""Scenarios: what ships is sound, what is wrong is named, loads have their shapes."""

from pathlib import Path

import pytest

from loadtests.scenario import SHIPPED, BadScenario, Scenario, read_scenario, read_tasks

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_scenario_can_be_read_and_says_what_it_is(name: str) -> None:
    assert read_scenario(name).description


def test_the_shapes_that_are_promised_ship() -> None:
    assert {"ramp", "spike", "soak", "mixed", "steady"} <= set(NAMES)
    assert {read_scenario(name).shape for name in NAMES} == {"constant", "ramp", "spike"}
    assert set(read_scenario("mixed").tasks) == {"translate", "generate", "answer", "sentiment", "summarize"}


def test_a_ramp_climbs_in_equal_steps_to_its_peak() -> None:
    ramp = Scenario(tasks={"translate": 1}, users=8, duration_s=80, shape="ramp", steps=4)
    assert [ramp.level(at_s) for at_s in (0, 19.9, 20, 45, 79, 90)] == [2, 2, 4, 6, 8, 8]


def test_a_spike_is_the_middle_third() -> None:
    spike = Scenario(tasks={"translate": 1}, rate=10, duration_s=90, shape="spike", spike_factor=5)
    assert [spike.level(at_s) for at_s in (0, 29.9, 30, 59.9, 60)] == [2, 2, 10, 10, 2]


def test_flags_go_over_the_file_and_turn_one_loop_into_the_other() -> None:
    opened = read_scenario("mixed", rate=2.0, duration_s=5.0)
    assert (opened.users, opened.rate, opened.duration_s) == (None, 2.0, 5.0)
    assert opened.warm_up_s == 1.0, "a short run must not be eaten up by its warm-up"
    assert read_scenario("steady", users=3).rate is None
    assert read_scenario("mixed", users=None).users == 8


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ("tasks = { translate = 1 }\nduration_s = 5", "either users"),
        ("tasks = { translate = 1 }\nduration_s = 5\nusers = 1\nrate = 1.0", "either users"),
        ("tasks = { dance = 1 }\nduration_s = 5\nusers = 1", "dance"),
        ("tasks = { translate = 1 }\nduration_s = 2\nusers = 1", "warm_up_s"),
        ("tasks = { translate = 1 }\nduration_s = 5\nusers = 1\nlist_size = [8, 2]", "list_size"),
        ("tasks = { translate = 1 }\nduration_s = 5\nusers = 1\nthnik_s = 1", "thnik_s"),
        ("tasks = ", "own.toml"),
    ],
)
def test_a_wrong_scenario_says_what_is_wrong(tmp_path: Path, fields: str, complaint: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(fields, encoding="utf-8")
    with pytest.raises(BadScenario, match=complaint):
        read_scenario(str(path))


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(BadScenario, match="mixed"):
        read_scenario("mxed")


def test_weights_of_tasks() -> None:
    assert read_tasks("translate=3, sentiment") == {"translate": 3.0, "sentiment": 1.0}
    with pytest.raises(BadScenario, match="many"):
        read_tasks("translate=many")
