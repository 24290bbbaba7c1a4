import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from energy.carbon import Carbon
from energy.ledger import Ledger, LedgerUnreadable
from energy.report import Group, read_moment, read_report
from energy.types import Bill, Bills, Part, Phase, Quality, RequestRecord, SettledRecord
from tests.energy.fakes import HeldClock

START_S = 1_700_000_000.0  # 2023-11-14T22:13:20Z
CARBON = Carbon("DEU").assumptions


def request(
    number: int,
    *,
    task: str = "translate",
    key: str | None = None,
    status: str = "ok",
    written: int = 10,
    time_s: float = START_S,
    uj: int | None = 100,
    quality: Quality = Quality.MEASURED,
) -> SettledRecord:
    record = RequestRecord(f"r{number}", task, f"tiny-{task}", status, 5, written, 1.0, 2.0, key)
    if uj is None:
        return SettledRecord(record, Bill(f"r{number}", None, None, None, Quality.UNAVAILABLE, True), time_s, CARBON)
    parts = (Part("cpu", Phase.DECODE, uj - 10), Part("cpu", Phase.PREFILL, 4), Part("dram", Phase.PREFILL, 6))
    return SettledRecord(record, Bill(f"r{number}", uj // 2, uj, uj * 1e-6, quality, True, parts), time_s, CARBON)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path, clock=HeldClock().clock)
    yield ledger
    ledger.close()


def written(ledger: Ledger, *records: SettledRecord) -> Path:
    for record in records:
        ledger.put(Bills.of(record))
    ledger.close()
    return ledger.path


def only(groups: tuple[Group, ...]) -> Group:
    (group,) = groups
    return group


def test_sums_means_and_percentiles_are_those_of_the_requests(ledger: Ledger) -> None:
    energies = list(range(100, 2100, 100))
    random.Random(0).shuffle(energies)
    path = written(ledger, *(request(i, uj=energy) for i, energy in enumerate(energies)))
    report = read_report(path, START_S, START_S + 1, "task")
    group = only(report.groups)
    assert (group.name, group.requests, group.answered) == ("translate", 20, 20)
    assert (group.input_tokens, group.output_tokens) == (100, 200)
    assert (group.active_uj, group.allocated_uj) == (sum(energies) // 2, sum(energies))
    assert group.gco2e == pytest.approx(sum(energies) * 1e-6)
    assert (group.query_mean_uj, group.query_p50_uj, group.query_p95_uj) == (1050, 1000, 1900)
    assert group.output_token_uj == sum(energies) / 200
    assert group.phases == {Phase.DECODE: sum(energies) - 200, Phase.PREFILL: 200}
    assert group.devices == {"cpu": sum(energies) - 120, "dram": 120}


def test_the_total_is_the_sum_of_the_groups(ledger: Ledger) -> None:
    path = written(ledger, *(request(i, task=task, uj=100 + i) for i, task in enumerate(("answer", "translate") * 3)))
    report = read_report(path, START_S, START_S + 1, "task")
    assert [group.name for group in report.groups] == ["answer", "translate"]
    assert report.total.requests == sum(group.requests for group in report.groups) == 6
    assert report.total.allocated_uj == sum(group.allocated_uj or 0 for group in report.groups) == 615
    assert report.total.phases[Phase.PREFILL] == 60


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("task", ["answer", "translate"]),
        ("model", ["tiny-answer", "tiny-translate"]),
        ("key", [None, "a", "b"]),
        ("hour", ["2023-11-14T22:00Z", "2023-11-14T23:00Z", "2023-11-15T00:00Z"]),
        ("day", ["2023-11-14", "2023-11-15"]),
    ],
)
def test_every_way_to_group(ledger: Ledger, by: str, names: list[str | None]) -> None:
    path = written(
        ledger,
        request(1, key="b", time_s=START_S),
        request(2, key="a", time_s=START_S + 3600, task="answer"),
        request(3, time_s=START_S + 7200),
    )
    report = read_report(path, 0, START_S + 9000, by)  # type: ignore[arg-type]
    assert [group.name for group in report.groups] == names
    assert sum(group.allocated_uj or 0 for group in report.groups) == 300


def test_the_start_of_a_time_belongs_to_it_and_its_end_does_not(ledger: Ledger) -> None:
    path = written(ledger, *(request(i, time_s=START_S + i, uj=100 + i) for i in range(4)))
    assert read_report(path, START_S + 1, START_S + 3, "task").total.allocated_uj == 203


def test_waste_is_in_the_sums_and_not_in_the_figures_per_query(ledger: Ledger) -> None:
    path = written(ledger, request(1, uj=100), request(2, uj=900, status="cancelled"))
    group = read_report(path, 0, START_S + 1, "task").total
    assert (group.requests, group.answered, group.allocated_uj) == (2, 1, 1000)
    assert (group.query_mean_uj, group.query_p50_uj, group.query_p95_uj) == (100, 100, 100)


def test_what_is_unknown_is_not_zero(ledger: Ledger) -> None:
    path = written(ledger, request(1, task="answer", uj=None), request(2, uj=100), request(3, uj=None))
    unknown, mixed = read_report(path, 0, START_S + 1, "task").groups
    assert (unknown.active_uj, unknown.allocated_uj, unknown.gco2e, unknown.query_mean_uj) == (None,) * 4
    assert (unknown.query_p50_uj, unknown.output_token_uj) == (None, None)
    assert unknown.quality_shares[Quality.UNAVAILABLE] == 1
    # Half of the requests, and half of the tokens, are of known energy.
    assert (mixed.allocated_uj, mixed.query_mean_uj, mixed.output_token_uj) == (100, 100, 10)
    assert mixed.quality_shares == {"measured": 0.5, "apportioned": 0, "estimated": 0, "unavailable": 0.5}


def test_tokens_are_only_counted_where_some_are_written(ledger: Ledger) -> None:
    path = written(ledger, request(1, uj=100), request(2, uj=700, written=0, task="sentiment"))
    sentiment, _ = read_report(path, 0, START_S + 1, "task").groups
    assert sentiment.output_token_uj is None
    assert read_report(path, 0, START_S + 1, "task").total.output_token_uj == 10


def test_a_time_without_requests_is_empty(ledger: Ledger) -> None:
    report = read_report(written(ledger, request(1)), 0, 1, "task")
    assert (report.groups, report.total.requests, report.total.allocated_uj) == ((), 0, None)
    assert report.total.quality_shares == {}


def test_no_ledger_is_no_empty_report(path: Path) -> None:
    with pytest.raises(LedgerUnreadable):
        read_report(path, 0, 1, "task")


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("90s", START_S - 90),
        ("15m", START_S - 900),
        ("24h", START_S - 86_400),
        ("7d", START_S - 7 * 86_400),
        ("2w", START_S - 14 * 86_400),
        ("99999d", 0),
        ("2023-11-14", 1_699_920_000),
        ("2023-11-14T22:13:20", START_S),
        ("2023-11-14T22:13:20Z", START_S),
        ("2023-11-14 23:13:20+01:00", START_S),
    ],
)
def test_moments(text: str, moment: float) -> None:
    assert read_moment(text, START_S) == moment


@pytest.mark.parametrize("text", ["", "h", "-1h", "yesterday", "2023-13-01", "9" * 40 + "d", "1.5h"])
def test_what_is_no_moment_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="an age such as 24h or 7d, or a time such as"):
        read_moment(text, START_S)
