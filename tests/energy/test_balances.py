"""What is charged is found again, whatever else comes and goes."""

from collections import Counter
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.balances import Balances, Charged
from energy.types import Part, Phase, Quality

CPU = Charged("cpu", Phase.ENCODE, "tiny", Quality.MEASURED, is_active=True)
CPU_IDLE = CPU._replace(is_active=False)
DRAM = CPU_IDLE._replace(device="dram")
POST = CPU._replace(phase=Phase.POST, quality=Quality.APPORTIONED)


def charge(balances: Balances, names: list[str], charged: Charged, shares_uj: list[int]) -> None:
    rows = balances.rows_of(names)
    balances.charge([rows], [charged], np.array(shares_uj))
    balances.know(rows, charged.quality)


def test_a_cost_names_its_parts_and_the_weakest_quality() -> None:
    balances = Balances()
    charge(balances, ["a", "b"], CPU, [70, 30])
    charge(balances, ["a", "b"], CPU_IDLE, [7, 3])
    charge(balances, ["a"], DRAM, [5])
    charge(balances, ["b"], POST, [2])
    balances.occupy([balances.rows_of(["a"]), balances.rows_of(["b", "a"])], np.array([4, 20, 8]))
    parts, allocated_uj, active_uj, time_ns, quality = balances.find("a")
    assert list(parts) == [Part("cpu", Phase.ENCODE, 77), Part("dram", Phase.ENCODE, 5)]
    assert (allocated_uj, active_uj, time_ns, quality) == (82, 70, 12, Quality.MEASURED)
    parts, allocated_uj, active_uj, time_ns, quality = balances.find("b")
    assert list(parts) == [Part("cpu", Phase.ENCODE, 33), Part("cpu", Phase.POST, 2)]
    assert (allocated_uj, active_uj, time_ns, quality) == (35, 32, 20, Quality.APPORTIONED)
    assert [balances.allocated_uj(name) for name in "abc"] == [
        (82, Quality.MEASURED),
        (35, Quality.APPORTIONED),
        (0, None),
    ]
    assert Counter(dict(balances.sums())) == {CPU: 100, CPU_IDLE: 10, DRAM: 5, POST: 2}


def test_who_was_charged_nothing_has_no_quality() -> None:
    balances = Balances()
    charge(balances, ["a"], CPU, [1])
    parts, *numbers = balances.find("somebody")
    assert (list(parts), numbers) == ([], [0, 0, 0, None])
    [(parts, *numbers)] = balances.costs(balances.take(["somebody"]))
    assert (list(parts), numbers) == ([], [0, 0, 0, None])


def test_what_costs_nothing_may_be_unknown() -> None:
    balances = Balances()
    balances.know(balances.rows_of(["a"]), Quality.UNAVAILABLE)
    assert balances.find("a")[1:] == (0, 0, 0, Quality.UNAVAILABLE)
    balances.know(balances.rows_of(["a"]), Quality.MEASURED)
    assert balances.find("a")[4] is Quality.UNAVAILABLE
    assert balances.allocated_uj("a") == (0, Quality.UNAVAILABLE)


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
        for name, row, cost in zip(gone, taken, balances.costs(taken), strict=True):
            sums = expected.pop(name)
            assert Counter(dict(balances.by_charged(row))) == sums
            assert cost[1:3] == (sum(sums.values()), sums[CPU] + sums[POST])
    left: Counter[Charged] = sum(expected.values(), Counter())
    assert Counter(dict(balances.sums())) == left
