"""One piece of many is measured, and the others are taken to be like it."""

from collections.abc import Iterator

from energy.types import NOTHING_BESIDE, Beside, Phase
from service.pace import TIMED, Pace


def test_what_is_not_measured_takes_what_others_of_its_kind_took() -> None:
    asked: list[int] = []

    def clock() -> Iterator[int]:
        now_ns = 0
        while True:
            asked.append(now_ns)
            yield now_ns
            # The first piece takes 100, the next that is measured 200.
            now_ns += 50 * len(asked) + 50

    times = clock()
    pace = Pace(lambda: next(times))
    took_ns = []
    for _ in range(TIMED + 1):
        beside = pace.begin("summarize", "tiny", Phase.POST, NOTHING_BESIDE)
        took_ns.append((pace.end() if pace.is_timed else beside).by_phase[Phase.POST])
    assert took_ns == [100] * TIMED + [125]
    assert len(asked) == 4


def test_every_kind_has_its_own() -> None:
    times = iter((0, 5, 10, 17, 20, 29))
    pace = Pace(lambda: next(times))
    took_ns = []
    kinds = ("answer", "one", Phase.POST), ("answer", "other", Phase.POST), ("translate", "one", Phase.POST)
    for kind in (*kinds, *kinds):
        beside = pace.begin(*kind, NOTHING_BESIDE)
        took_ns.append((pace.end() if pace.is_timed else beside).cpu_ns)
    assert took_ns == [5, 7, 9] * 2


def test_a_request_has_all_its_pieces_and_shares_what_it_took_with_others() -> None:
    times = iter((0, 5, 10, 17))
    pace = Pace(lambda: next(times))
    found = []
    for _ in range(3):
        beside = NOTHING_BESIDE
        for phase in (Phase.PREPROCESS, Phase.POST):
            beside = pace.begin("answer", "one", phase, beside)
            if pace.is_timed:
                beside = pace.end()
        found.append(beside)
    assert found == [Beside({Phase.PREPROCESS: 5, Phase.POST: 7}, 12)] * 3
    assert found[0] is found[1] is found[2]
