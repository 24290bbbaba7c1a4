"""One piece of many is measured, and the others are taken to be like it."""

from collections.abc import Iterator

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
        known_ns = pace.begin("short")
        took_ns.append(pace.end() if pace.is_timed else known_ns)
    assert took_ns == [100] * TIMED + [125]
    assert len(asked) == 4


def test_every_kind_has_its_own() -> None:
    times = iter((0, 5, 10, 17))
    pace = Pace(lambda: next(times))
    took_ns = []
    for kind in ("one", "other", "one"):
        known_ns = pace.begin(kind)
        took_ns.append(pace.end() if pace.is_timed else known_ns)
    assert took_ns == [5, 7, 5]
