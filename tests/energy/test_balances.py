"""What is charged is found again, whatever else comes and goes."""

from collections import Counter
from random import Random
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.balances import Balances, Charged, Costs
from energy.types import Part, Phase, Quality

CPU = Charged("cpu", Phase.ENCODE, "tiny", Quality.MEASURED, is_active=True)
CPU_IDLE = CPU._replace(is_active=False)
DRAM = CPU_IDLE._replace(device="dram")
POST = CPU._replace(phase=Phase.POST, quality=Quality.APPORTIONED)


class Cost(NamedTuple):
    parts: tuple[Part, ...]
    allocated_uj: int
    active_uj: int
    time_ns: int
    quality: Quality | None


def told(costs: Costs, i: int = 0) -> Cost:
    """One of those that are alike."""
    sums = (int(each[i]) for each in (costs.allocated_uj, costs.active_uj, costs.times_ns))
    return Cost(costs.places.parts(costs.parts_uj[i].tolist()), *sums, costs.quality)


def charge(balances: Balances, names: list[str], charged: Charged, shares_uj: list[int]) -> None:
    rows = balances.open(names)
    balances.charge([rows], [charged], np.array(shares_uj))
    balances.know(rows, charged.quality)


def test_a_cost_names_its_parts_and_the_weakest_quality() -> None:
    balances = Balances()
    charge(balances, ["a", "b"], CPU, [70, 30])
    charge(balances, ["a", "b"], CPU_IDLE, [7, 3])
    charge(balances, ["a"], DRAM, [5])
    charge(balances, ["b"], POST, [2])
    balances.occupy([balances.open(["a"]), balances.open(["b", "a"])], np.array([4, 20, 8]))
    cost = told(balances.find("a"))
    assert cost.parts == (Part("cpu", Phase.ENCODE, 77), Part("dram", Phase.ENCODE, 5))
    assert cost[1:] == (82, 70, 12, Quality.MEASURED)
    cost = told(balances.find("b"))
    assert cost.parts == (Part("cpu", Phase.ENCODE, 33), Part("cpu", Phase.POST, 2))
    assert cost[1:] == (35, 32, 20, Quality.APPORTIONED)
    assert [balances.allocated_uj(name) for name in "abc"] == [
        (82, Quality.MEASURED),
        (35, Quality.APPORTIONED),
        (0, None),
    ]
    assert Counter(dict(balances.sums())) == {CPU: 100, CPU_IDLE: 10, DRAM: 5, POST: 2}


def test_who_was_charged_nothing_has_no_quality() -> None:
    balances = Balances()
    charge(balances, ["a"], CPU, [1])
    assert told(balances.find("somebody")) == ((), 0, 0, 0, None)
    (costs,) = balances.costs(balances.take(["somebody"]))
    assert told(costs) == ((), 0, 0, 0, None)


def test_what_costs_nothing_may_be_unknown() -> None:
    balances = Balances()
    balances.know(balances.open(["a"]), Quality.UNAVAILABLE)
    assert told(balances.find("a")) == ((), 0, 0, 0, Quality.UNAVAILABLE)
    balances.know(balances.open(["a"]), Quality.MEASURED)
    assert balances.find("a").quality is Quality.UNAVAILABLE
    assert balances.allocated_uj("a") == (0, Quality.UNAVAILABLE)


def test_bills_in_the_same_places_are_told_apart_by_quality() -> None:
    balances = Balances()
    charge(balances, ["a", "b", "c"], CPU, [1, 2, 3])
    balances.know(balances.open(["b"]), Quality.UNAVAILABLE)
    costs = list(balances.costs(balances.take(["a", "b", "c"])))
    found = {(each.quality, tuple(each.numbers.tolist()), tuple(each.allocated_uj.tolist())) for each in costs}
    assert found == {(Quality.MEASURED, (0, 2), (1, 3)), (Quality.UNAVAILABLE, (1,), (2,))}


def test_bills_in_however_many_places_are_told_apart() -> None:
    balances = Balances()
    places = [(f"gpu:{i}", phase) for i in range(12) for phase in Phase]
    assert len(places) > 64
    names = [f"r{i}" for i in range(len(places))]
    for i, (device, phase) in enumerate(places):
        # Who comes later was in fewer of them.
        charge(balances, names[i:], CPU._replace(device=device, phase=phase), [7] * len(names[i:]))
    found = {
        number: told(alike, i)
        for alike in balances.costs(balances.take(names))
        for i, number in enumerate(alike.numbers)
    }
    for number in range(len(names)):
        parts = {(part.device, part.phase): part.energy_uj for part in found[number].parts}
        assert parts == dict.fromkeys(places[: number + 1], 7)


@settings(max_examples=50)
@given(st.integers(0, 2**32))
def test_rows_are_used_again_and_never_mixed_up(seed: int) -> None:
    random, balances = Random(seed), Balances()
    expected: dict[str, Counter[Charged]] = {}
    for number in range(60):
        names = [f"r{number}-{i}" for i in range(random.randint(0, 3))]
        names += random.sample(sorted(expected), random.randint(0, len(expected)))
        charged = random.choice([CPU, CPU_IDLE, DRAM, POST])
        if names:
            shares_uj = [random.randint(1, 1000) for _ in names]
            charge(balances, names, charged, shares_uj)
            for name, share_uj in zip(names, shares_uj, strict=True):
                expected.setdefault(name, Counter())[charged] += share_uj
        gone = random.sample(sorted(expected), random.randint(0, len(expected)))
        taken = balances.take(gone)
        costs = {number: told(alike, i) for alike in balances.costs(taken) for i, number in enumerate(alike.numbers)}
        for number, (name, row) in enumerate(zip(gone, taken, strict=True)):
            sums = expected.pop(name)
            assert Counter(dict(balances.by_charged(row))) == sums
            cost = costs.pop(number)
            assert cost[1:3] == (sum(sums.values()), sums[CPU] + sums[POST])
            parts = Counter({(part.device, part.phase): part.energy_uj for part in cost.parts})
            assert parts == sum((Counter({(c.device, c.phase): uj}) for c, uj in sums.items()), Counter())
            assert cost.quality is max((charged.quality for charged in sums), key=list(Quality).index)
        assert not costs
    left: Counter[Charged] = sum(expected.values(), Counter())
    assert Counter(dict(balances.sums())) == left
