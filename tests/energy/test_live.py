"""What a dashboard sees, on a clock that is moved by hand."""

from dataclasses import replace
from itertools import pairwise

from energy.account import Attributed, MeterTotal, Totals, Unattributed
from energy.carbon import Carbon
from energy.live import BOUNDS_UJ, INTERVAL_S, MOMENTS, RECENT, Live, Moment
from energy.settlement import Reason
from energy.types import Bill, Bills, Phase, Quality, RequestRecord, SettledRecord
from tests.energy.fakes import HeldClock


def record(number: int, allocated_uj: int | None, status: str = "ok", task: str = "translate") -> SettledRecord:
    request_id = f"req-{number}"
    gco2e = None if allocated_uj is None else allocated_uj / 1e6
    quality = Quality.UNAVAILABLE if allocated_uj is None else Quality.MEASURED
    return SettledRecord(
        RequestRecord(request_id, task, "tiny", status, 5, 6),
        Bill(request_id, allocated_uj, allocated_uj, gco2e, quality, settled=True),
        1_700_000_000.0,
        Carbon().assumptions,
    )


def totals(by_task: dict[str, int], idle_uj: int, residual_uj: int = 0) -> Totals:
    settled_uj = sum(by_task.values()) + idle_uj
    attributed = [
        Attributed("cpu", "tiny", task, phase, Quality.MEASURED, part)
        for task, energy_uj in by_task.items()
        for phase, part in ((Phase.PREFILL, energy_uj // 2), (Phase.DECODE, energy_uj - energy_uj // 2))
    ]
    return Totals(
        (MeterTotal("cpu", "powercap", settled_uj, residual_uj, open_uj=0),),
        tuple(attributed),
        (Unattributed("cpu", Reason.IDLE, idle_uj),),
    )


def test_a_moment_is_kept_every_interval_and_the_oldest_are_forgotten() -> None:
    held = HeldClock()
    live = Live(held.clock)
    for second in range(round(INTERVAL_S * (MOMENTS + 10))):
        live.tick(totals({"translate": 3 * second, "answer": second}, 10 * second, residual_uj=7))
        held.run(1000)
    moments = live.view().moments
    assert len(moments) == MOMENTS
    assert {round(now.time_s - then.time_s) for then, now in pairwise(moments)} == {INTERVAL_S}
    began_s = round(moments[0].time_s - live.view().began_s)
    assert moments[0] == Moment(
        moments[0].time_s, 14 * began_s + 7, {"translate": 3 * began_s, "answer": began_s}, {"idle": 10 * began_s}
    )
    assert live.view().meters[0].source == "powercap"


def test_bills_are_summed_by_task_and_class() -> None:
    live = Live(HeldClock().clock)
    for number, energy_uj in enumerate((1, BOUNDS_UJ[0], BOUNDS_UJ[0] + 1, BOUNDS_UJ[-1] + 1, None)):
        live.settled([Bills.of(record(number, energy_uj))])
    live.settled([Bills.of(record(9, 50, task="answer", status="cancelled"))])
    sums = live.view().tasks
    assert list(sums) == ["translate", "answer"]
    assert (sums["translate"].requests, sums["translate"].unknown) == (5, 1)
    assert sums["translate"].allocated_uj == 1 + 2 * BOUNDS_UJ[0] + 1 + BOUNDS_UJ[-1] + 1
    assert sums["translate"].counts == [2, 1, *[0] * (len(BOUNDS_UJ) - 2), 1]
    assert sums["answer"].gco2e == 50e-6


def test_a_key_has_sums_of_its_own() -> None:
    live = Live(HeldClock().clock)
    for number, key in enumerate(("alice", "bob", None, "alice")):
        billed = record(number, 5 + number)
        live.settled([Bills.of(billed._replace(request=billed.request._replace(key=key)))])
    for key, energies in (("alice", [5, 8]), ("bob", [6]), (None, [5, 6, 7, 8])):
        view = live.view(key)
        assert view.tasks["translate"].allocated_uj == sum(energies)
        assert view.tasks["translate"].requests == sum(view.tasks["translate"].counts) == len(energies)
        assert [each.bill.allocated_uj for each in view.recent] == energies[::-1]
    assert (live.view("carol").tasks, live.view("carol").recent) == ({}, ())


def test_what_was_refused_is_left_out() -> None:
    live = Live(HeldClock().clock)
    live.settled([Bills.of(record(0, 0, status="refused"))])
    assert (live.view().tasks, live.view().recent) == ({}, ())


def test_the_last_bills_come_newest_first_and_are_bounded() -> None:
    live = Live(HeldClock().clock)
    for number in range(RECENT + 20):
        live.settled([Bills.of(record(number, 5))])
    recent = live.view().recent
    assert [each.request.request_id for each in recent[:2]] == [f"req-{RECENT + 19}", f"req-{RECENT + 18}"]
    assert len(recent) == RECENT


def test_bills_that_come_together_are_in_the_order_of_their_ends() -> None:
    live = Live(HeldClock().clock)
    records = [record(number, 5, task="answer" if number % 2 else "translate") for number in range(4)]
    ended = [each._replace(time_s=each.time_s + number) for number, each in enumerate(records)]
    live.settled(map(Bills.of, [ended[0], ended[2], ended[1], ended[3]]))
    assert [each.request.request_id for each in live.view().recent] == ["req-3", "req-2", "req-1", "req-0"]


def test_a_view_does_not_change_afterwards() -> None:
    live = Live(HeldClock().clock)
    live.settled([Bills.of(record(0, 5))])
    view = live.view()
    before = replace(view.tasks["translate"], counts=list(view.tasks["translate"].counts))
    live.settled([Bills.of(record(1, 5))])
    assert view.tasks["translate"] == before
