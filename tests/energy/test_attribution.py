from collections import Counter
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from energy.attribution import Coefficients, charge, share_load, split, weigh
from energy.types import Phase, Step, Work

coefficients = st.builds(
    Coefficients,
    fixed=st.integers(1, 10**6),
    prefill_token=st.integers(0, 10**6),
    decode_token=st.integers(0, 10**6),
    context_token=st.integers(0, 1000),
)
energies = st.integers(0, 10**12)


@st.composite
def works(draw: st.DrawFn, at_least: int = 1) -> list[Work]:
    kinds = st.tuples(st.sampled_from([Phase.PREFILL, Phase.DECODE]), st.integers(0, 4096), st.integers(0, 4096))
    sizes = draw(st.lists(kinds, min_size=at_least, max_size=20))
    return [Work(f"r{i}", phase, tokens, context) for i, (phase, tokens, context) in enumerate(sizes)]


def shares(energy_uj: int, work: Sequence[Work], c: Coefficients) -> list[int]:
    """What each entry of one step is charged."""
    charged = charge(energy_uj, parts(work, c))
    return [charged.get(item.request_id, 0) for item in work]


def parts(work: Sequence[Work], c: Coefficients) -> dict[str, int]:
    return dict(zip((item.request_id for item in work), weigh(work, c), strict=True))


@given(energies, works(), coefficients)
def test_charges_sum_to_the_energy_exactly(energy_uj: int, work: list[Work], c: Coefficients) -> None:
    charges = shares(energy_uj, work, c)
    assert sum(charges) == energy_uj
    assert min(charges) >= 0


@given(energies, works(), coefficients, st.randoms())
def test_order_does_not_matter(energy_uj: int, work: list[Work], c: Coefficients, random: Random) -> None:
    shuffled = list(work)
    random.shuffle(shuffled)
    before = dict(zip((item.request_id for item in work), shares(energy_uj, work, c), strict=True))
    after = dict(zip((item.request_id for item in shuffled), shares(energy_uj, shuffled, c), strict=True))
    assert before == after


@given(energies, works(at_least=2), coefficients)
def test_equal_work_is_charged_equally_and_more_work_never_less(
    energy_uj: int, work: list[Work], c: Coefficients
) -> None:
    twins = [*work, Work("twin", work[0].phase, work[0].tokens, work[0].context_tokens)]
    charges = shares(energy_uj, twins, c)
    assert abs(charges[0] - charges[-1]) <= 1
    weights = weigh(twins, c)
    for i, j in zip(range(len(twins)), range(1, len(twins)), strict=False):
        if weights[i] > weights[j]:
            assert charges[i] >= charges[j] - 1


@given(energies, works(), coefficients)
def test_alone_a_request_pays_everything(energy_uj: int, work: list[Work], c: Coefficients) -> None:
    assert shares(energy_uj, work[:1], c) == [energy_uj]


@given(energies, works(), st.integers(1, 10**6))
def test_without_work_a_request_pays_nothing_of_m(energy_uj: int, work: list[Work], fixed: int) -> None:
    guest = Work("guest", Phase.DECODE, 0, 0)
    free = Coefficients(fixed=0, prefill_token=3, decode_token=5, context_token=1)
    if sum(weigh(work, free)):
        assert shares(energy_uj, [*work, guest], free)[-1] == 0
    # Of F it pays one share in n, whatever the others do.
    c = Coefficients(fixed=fixed, prefill_token=3, decode_token=5, context_token=1)
    assert weigh([*work, guest], c)[-1] == fixed


@given(st.lists(st.tuples(energies, works()), max_size=8), coefficients, st.randoms())
def test_over_many_steps_nothing_is_made_or_lost_in_any_order(
    steps: list[tuple[int, list[Work]]], c: Coefficients, random: Random
) -> None:
    def charge_all() -> Counter[str]:
        charged: Counter[str] = Counter()
        for energy_uj, work in steps:
            charged.update(charge(energy_uj, parts(work, c)))
        return charged

    charged = charge_all()
    assert sum(charged.values()) == sum(energy_uj for energy_uj, _ in steps)
    random.shuffle(steps)
    assert charge_all() == charged


def test_the_affine_cost_is_charged_to_those_who_cause_it() -> None:
    # F = 40 shared by four, m = 10 a token: 10 + 30, 10 + 10, 10 and 10.
    work = [Work(name, Phase.DECODE, tokens) for name, tokens in (("a", 3), ("b", 1), ("c", 0), ("d", 0))]
    assert shares(80, work, Coefficients(fixed=40, decode_token=10)) == [40, 20, 10, 10]
    assert shares(40, work, Coefficients(fixed=0, decode_token=10)) == [30, 10, 0, 0]


@given(st.lists(works(at_least=2), min_size=1, max_size=4), coefficients)
def test_several_passes_weigh_what_each_of_them_does(passes: list[list[Work]], c: Coefficients) -> None:
    rows = min(map(len, passes))
    passes = [[item._replace(phase=passes[0][i].phase) for i, item in enumerate(work[:rows])] for work in passes]
    together = [
        Work(each[0].request_id, each[0].phase, sum(w.tokens for w in each), sum(w.context_tokens for w in each))
        for each in zip(*passes, strict=True)
    ]
    apart = [sum(weights) for weights in zip(*(weigh(work, c) for work in passes), strict=True)]
    assert weigh(together, c, len(passes)) == apart


def test_the_load_of_a_step_of_several_passes_is_shared_by_all_of_them() -> None:
    work = (Work("a", Phase.DECODE, 3, 30), Work("b", Phase.DECODE, 3, 330))
    step = Step("cpu:0", "tiny", 0, 10**6, 10**6, work, passes=3)
    # F = 100 three times for two, m = 10 a token and 1 a token of context: 150 + 30 + 30, and 150 + 30 + 330.
    assert share_load(step, Coefficients(100, 10, 10, 1)) == [10**6 * 210 // 720, 10**6 * 510 // 720]


def test_context_weighs_little_but_weighs() -> None:
    short, long = weigh([Work("a", Phase.DECODE, 1, 0), Work("b", Phase.DECODE, 1, 512)], Coefficients())
    assert 1 < long / short < 2.5


def test_the_odd_microjoule_goes_to_the_largest_remainder_then_to_the_smaller_key() -> None:
    assert split(10, [1, 2, 4], ["a", "b", "c"]) == [1, 3, 6]
    assert split(1, [1, 1], ["b", "a"]) == [0, 1]
