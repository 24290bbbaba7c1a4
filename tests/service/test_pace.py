"""One request of many is measured, and the others are taken to be like it."""

from energy.types import Beside, Phase
from service.pace import TIMED, Pace


def test_what_is_not_measured_takes_what_others_of_its_kind_took() -> None:
    pace, measured, taken_ns = Pace(), iter((100, 200)), []
    for _ in range(TIMED + 1):
        taken = pace.begin("summarize", "tiny")
        beside = taken.get(Phase.POST) or pace.learn("summarize", "tiny", Phase.POST, next(measured))
        taken_ns.append(beside.by_phase[Phase.POST])
    assert taken_ns == [100] * TIMED + [125]
    assert next(measured, None) is None


def test_every_kind_has_its_own() -> None:
    pace, taken_ns = Pace(), []
    kinds = ("answer", "one"), ("answer", "other"), ("translate", "one")
    for kind, took_ns in zip(kinds, (5, 7, 9), strict=True):
        assert not pace.begin(*kind)
        pace.learn(*kind, Phase.POST, took_ns)
    for kind in kinds:
        taken_ns.append(pace.begin(*kind)[Phase.POST].cpu_ns)
    assert taken_ns == [5, 7, 9]


def test_a_request_has_all_its_pieces_and_shares_what_it_took_with_others() -> None:
    pace = Pace()
    first = pace.begin("answer", "one")
    assert not first
    assert pace.learn("answer", "one", Phase.PREPROCESS, 5) == Beside({Phase.PREPROCESS: 5}, 5)
    # While the first is not over, nobody knows what its last piece takes.
    second = pace.begin("answer", "one")
    assert list(second) == [Phase.PREPROCESS]
    whole = pace.learn("answer", "one", Phase.POST, 7)
    assert whole == Beside({Phase.PREPROCESS: 5, Phase.POST: 7}, 12)
    assert second[Phase.POST] is whole is pace.begin("answer", "one")[Phase.POST]
