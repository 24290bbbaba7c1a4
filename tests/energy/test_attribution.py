from collections import Counter
from collections.abc import Sequence
from itertools import chain
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.attribution import Coefficients, share_load, share_loads, split
from energy.types import Phase, Work
from tests.energy.fakes import step_of, weigh

coefficients = st.builds(
    Coefficients,
    fixed=st.integers(1, 10**6),
    prefill_token=st.integers(0, 10**6),
    decode_token=st.integers(0, 10**6),
    context_token=st.integers(0, 1000),
)
energies = st.integers(0, 10**12)
Sizes = list[tuple[str, int, int]]
"""Requests with tokens and context tokens."""


@st.composite
def sizes(draw: st.DrawFn, at_least: int = 1) -> Sizes:
    each = st.tuples(st.integers(0, 4096), st.integers(0, 4096))
    drawn = draw(st.lists(each, min_size=at_least, max_size=20))
    return [(f"r{i}", tokens, context) for i, (tokens, context) in enumerate(drawn)]


phases = st.sampled_from([Phase.PREFILL, Phase.DECODE])


def work_of(rows: Sizes, phase: Phase = Phase.PREFILL) -> Work:
    """What an executor makes of these: who looks back computes as many tokens as the others of the step."""
    names, tokens, context = zip(*rows, strict=True)
    if phase is Phase.PREFILL:
        return Work(phase, names, tokens)
    return Work(phase, names, [max(tokens)] * len(rows), context)


def charge(energy_uj: int, rows: Sizes, c: Coefficients, phase: Phase = Phase.PREFILL) -> dict[str, int]:
    """What each request of one step is charged."""
    names = [name for name, _, _ in rows]
    return dict(zip(names, split_one(energy_uj, whole(work_of(rows, phase), c), names), strict=True))


def whole(work: Work, c: Coefficients) -> list[int]:
    """What requests weigh: the shares of a load as large as all of their weights."""
    load_ns = round(sum(weigh(work, c)))
    if not load_ns:
        return [0] * len(work.tokens)
    return share_loads([step_of(work, ended_ns=load_ns, device="gpu:0", coefficients=c)]).tolist()


def split_one(total: int, weights: Sequence[int], keys: Sequence[str]) -> list[int]:
    """As the account does it: who shares is put in order first."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shares = split([total], [np.array([weights[i] for i in order])]).tolist()
    return [shares[order.index(i)] for i in range(len(keys))]


@given(energies, sizes(), coefficients, phases)
def test_charges_sum_to_the_energy_exactly(energy_uj: int, rows: Sizes, c: Coefficients, phase: Phase) -> None:
    charges = charge(energy_uj, rows, c, phase).values()
    assert sum(charges) == energy_uj
    assert min(charges) >= 0


@given(energies, sizes(), coefficients, phases, st.randoms())
def test_order_does_not_matter(energy_uj: int, rows: Sizes, c: Coefficients, phase: Phase, random: Random) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert charge(energy_uj, rows, c, phase) == charge(energy_uj, shuffled, c, phase)


@given(energies, sizes(at_least=2), coefficients, phases)
def test_equal_work_is_charged_equally_and_more_work_never_less(
    energy_uj: int, rows: Sizes, c: Coefficients, phase: Phase
) -> None:
    twins = [*rows, ("twin", *rows[0][1:])]
    charges = list(charge(energy_uj, twins, c, phase).values())
    assert abs(charges[0] - charges[-1]) <= 1
    heavy = whole(work_of(twins, phase), c)
    for i, j in zip(range(len(twins)), range(1, len(twins)), strict=False):
        if heavy[i] > heavy[j]:
            assert charges[i] >= charges[j] - 1


@given(energies, sizes(), coefficients, phases)
def test_alone_a_request_pays_everything(energy_uj: int, rows: Sizes, c: Coefficients, phase: Phase) -> None:
    assert list(charge(energy_uj, rows[:1], c, phase).values()) == [energy_uj]
    assert share_loads([step_of(work_of(rows[:1], phase), cpu_ns=12345, coefficients=c)]).tolist() == [12345]
    # Also of a prompt that is read on.
    alone = Work(Phase.PREFILL, ["r"], [rows[0][1]], [rows[0][2]])
    assert share_loads([step_of(alone, cpu_ns=12345, coefficients=c)]).tolist() == [12345]


@given(energies, sizes(), st.integers(1, 10**6))
def test_without_work_a_request_pays_nothing_of_m(energy_uj: int, rows: Sizes, fixed: int) -> None:
    guest = ("guest", 0, 0)
    free = Coefficients(fixed=0, prefill_token=3, decode_token=5, context_token=1)
    if sum(whole(work_of(rows), free)):
        assert charge(energy_uj, [*rows, guest], free)["guest"] == 0
    # Of F it pays one share in n, whatever the others do.
    c = Coefficients(fixed=fixed, prefill_token=3, decode_token=5, context_token=1)
    assert whole(work_of([*rows, guest]), c)[-1] == fixed


@given(st.lists(st.tuples(energies, sizes()), max_size=8), coefficients, st.randoms())
def test_over_many_steps_nothing_is_made_or_lost_in_any_order(
    steps: list[tuple[int, Sizes]], c: Coefficients, random: Random
) -> None:
    def charge_all() -> Counter[str]:
        charged: Counter[str] = Counter()
        for energy_uj, rows in steps:
            charged.update(charge(energy_uj, rows, c))
        return charged

    charged = charge_all()
    assert sum(charged.values()) == sum(energy_uj for energy_uj, _ in steps)
    random.shuffle(steps)
    assert charge_all() == charged


@given(st.lists(st.tuples(sizes(), phases, st.integers(0, 10**10)), min_size=1), coefficients)
def test_loads_of_many_steps_are_shared_in_proportion_to_weights(
    some: list[tuple[Sizes, Phase, int]], c: Coefficients
) -> None:
    steps, expected = [], []
    for rows, phase, load_ns in some:
        work = work_of(rows, phase)
        heavy = weigh(work, c)
        steps.append(step_of(work, ended_ns=load_ns, device="gpu:0", coefficients=c))
        expected += [load_ns * weight / sum(heavy) for weight in heavy]
    assert share_loads(steps).tolist() == [pytest.approx(load_ns, abs=0.51) for load_ns in expected]


def test_the_affine_cost_is_charged_to_those_who_cause_it() -> None:
    # F = 40 shared by four, m = 10 a token: 10 + 30, 10 + 10, 10 and 10.
    rows = [(name, tokens, 0) for name, tokens in (("a", 3), ("b", 1), ("c", 0), ("d", 0))]
    assert list(charge(80, rows, Coefficients(fixed=40, prefill_token=10)).values()) == [40, 20, 10, 10]
    assert list(charge(40, rows, Coefficients(fixed=0, prefill_token=10)).values()) == [30, 10, 0, 0]


@given(sizes(), phases, st.integers(1, 5), st.integers(1, 10**10), coefficients)
def test_the_load_of_one_step_is_shared_in_proportion_to_weights(
    rows: Sizes, phase: Phase, passes: int, load_ns: int, c: Coefficients
) -> None:
    work = work_of(rows, phase)
    even_ns, each_ns, own = share_load(load_ns, work, passes, c.of(phase))
    weights = weigh(work, c, passes)
    expected = [load_ns * weight / sum(weights) for weight in weights]
    assert [even_ns + each_ns * number for number in own] == [pytest.approx(share_ns) for share_ns in expected]


def test_the_load_of_a_step_of_several_passes_is_shared_by_all_of_them() -> None:
    work = work_of([("a", 1, 9), ("b", 1, 109)], Phase.DECODE)
    step = step_of(work, cpu_ns=720_000, passes=3, coefficients=Coefficients(100, 10, 10, 1))
    # F = 100 three times for two, m = 10 a token and 1 a token of context: 150 + 30 + 9 + 10 + 11, and 100 more each.
    assert share_loads([step]).tolist() == [210_000, 510_000]


def test_context_weighs_little_but_weighs() -> None:
    short, long = whole(work_of([("a", 1, 0), ("b", 1, 512)], Phase.DECODE), Coefficients())
    assert 1 < long / short < 2.5


def test_the_odd_microjoule_goes_to_the_largest_remainder_then_to_the_first() -> None:
    assert split([10], [np.array([1, 2, 4])]).tolist() == [1, 3, 6]
    assert split([1], [np.array([1, 1])]).tolist() == [1, 0]
    assert split([5, 1], [np.array([2, 2, 2]), np.array([3, 3, 4])]).tolist() == [2, 2, 1, 0, 0, 1]
    assert split([5], [np.array([0, 0, 0])]).tolist() == [2, 2, 1]


amounts = st.integers(0, 10**13)


@given(st.lists(st.tuples(amounts, st.lists(amounts, min_size=1, max_size=20)), max_size=5))
def test_many_totals_are_split_as_each_alone_however_large(some: list[tuple[int, list[int]]]) -> None:
    together = split([total for total, _ in some], [np.array(heavy) for _, heavy in some]).tolist()
    apart = [split([total], [np.array(heavy)]).tolist() for total, heavy in some]
    assert together == list(chain.from_iterable(apart))
    for (total, heavy), shares in zip(some, apart, strict=True):
        assert sum(shares) == total
        for share_uj, weight in zip(shares, heavy, strict=True):
            if sum(heavy):
                assert share_uj - total * weight // sum(heavy) in (0, 1)
