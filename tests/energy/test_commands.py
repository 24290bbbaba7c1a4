"""`wattle energy report`: what it prints, and the files it writes."""

import csv
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pyarrow import parquet

from energy.ledger import Ledger
from energy.types import Bills, Quality
from tests.energy.fakes import HeldClock
from tests.energy.test_report import START_S, request
from wattle import main

SINCE = ("--since", "2023-11-14", "--until", "2023-11-16")


@pytest.fixture
def ledger(tmp_path: Path) -> str:
    """Three translations of 1, 2 and 6 J, and an answer whose cost is not known."""
    ledger = Ledger(tmp_path / "ledger.sqlite", clock=HeldClock().clock)
    for number, joules in enumerate((1, 2, 6)):
        ledger.put(Bills.of(request(number, uj=joules * 1_000_000, key="<b>", time_s=START_S + number * 3600)))
    ledger.put(Bills.of(request(9, task="answer", uj=None, written=0, quality=Quality.UNAVAILABLE)))
    ledger.close()
    return str(ledger.path)


def report(*arguments: str) -> int:
    return main(["energy", "report", *arguments])


def test_the_table_is_printed(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--ledger", ledger, *SINCE) == 0
    head, _, *table = capsys.readouterr().out.splitlines()
    assert head == "Requests that ended from 2023-11-14 00:00 to 2023-11-16 00:00 (UTC), by task"
    cells = {row.split()[0]: re.split(r"\s{2,}", row) for row in table}
    assert cells["task"][1:] == [
        *("requests", "tokens in", "tokens out", "active J", "allocated J", "J/query", "p50", "p95", "J/token out"),
        *("gCO2e", "quality"),
    ]
    assert cells["translate"][1:] == ["3", "15", "30", "4.5", "9", "3", "2", "6", "0.3", "9", "measured"]
    assert cells["answer"][4:] == ["-", "-", "-", "-", "-", "-", "-", "unavailable"]
    assert cells["total"][-1] == "measured 75.0%, unavailable 25.0%"


def test_a_time_without_requests_is_said(ledger: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("--ledger", ledger) == 0
    assert capsys.readouterr().out.endswith("by task: none.\n")


def test_the_service_s_ledger_is_read_where_none_is_named(
    ledger: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTLE_LEDGER", ledger)
    monkeypatch.setenv("WATTLE_REPORT_BY", "hour")
    assert report(*SINCE) == 0
    assert "2023-11-14T23:00Z" in capsys.readouterr().out


def test_csv_and_parquet_hold_the_groups_in_joules(ledger: str, tmp_path: Path) -> None:
    csv_file, parquet_file = tmp_path / "r.csv", tmp_path / "r.parquet"
    assert report("--ledger", ledger, *SINCE, "--csv", str(csv_file), "--parquet", str(parquet_file)) == 0
    with csv_file.open(newline="") as file:
        answer, translate = csv.DictReader(file)
    assert (translate["task"], translate["allocated_j"], translate["share_measured"]) == ("translate", "9.0", "1.0")
    assert (answer["allocated_j"], answer["j_per_query_p95"], answer["requests"]) == ("", "", "1")
    rows = parquet.read_table(parquet_file).to_pylist()
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == [
        answer,
        translate,
    ]
    assert rows[1]["device_dram_j"] == pytest.approx(18e-6)


def test_parquet_without_its_package_says_what_to_install(
    ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert report("--ledger", ledger, *SINCE, "--parquet", str(tmp_path / "r.parquet")) == 1
    assert "pyarrow is not installed; it comes with the extra [report]" in capsys.readouterr().err


class Page(HTMLParser):
    """The bars and texts of a page, and whether every tag is closed by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.rects: list[dict[str, str | None]] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "rect":
            self.rects.append(dict(attrs))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rects += [dict(attrs)] if tag == "rect" else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("by", ["task", "model", "key", "hour", "day"])
def test_the_page_shows_every_group_and_needs_nothing_from_elsewhere(ledger: str, tmp_path: Path, by: str) -> None:
    file = tmp_path / "r.html"
    assert report("--ledger", ledger, *SINCE, "--by", by, "--html", str(file)) == 0
    html = file.read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    assert (page.open, page.links) == ([], [])
    assert "url(" not in html and "@import" not in html and "<b>&lt;b" not in html
    shown = " ".join("".join(page.text).split())
    names = {"task": "translate", "model": "tiny-translate", "key": "<b>", "hour": "2023-11-15T00:00Z"}
    assert names.get(by, "2023-11-14") in shown
    # Nothing leaves its plot.
    for rect in page.rects:
        for begin, length in (("x", "width"), ("y", "height")):
            start, size = (float((rect.get(name) or "0").rstrip("%")) for name in (begin, length))
            assert start >= 0 and size >= 0 and start + size <= 100.001
    assert len(page.rects) >= 6


def test_a_page_of_nothing(ledger: str, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    assert report("--ledger", ledger, "--html", str(file)) == 0
    assert "<svg" not in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--since", "yesterday"), 2, "since: must be an age such as 24h"),
        (("--since", "1h", "--until", "2h"), 2, "since: must be before until"),
        (("--by", "caller"), 2, "by: Input should be 'task', 'model', 'key', 'hour' or 'day'"),
        (("--ledger", "/nonexistent/ledger"), 1, "the ledger /nonexistent/ledger cannot be read: unable to open"),
        (("--csv", "/nonexistent/r.csv"), 1, "/nonexistent/r.csv cannot be written: "),
    ],
)
def test_what_is_wrong_is_one_line(
    ledger: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, message: str
) -> None:
    named = () if "--ledger" in arguments else ("--ledger", ledger)
    assert report(*named, *arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wattle: {message}")


def test_another_command_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["energy", "reports"]) == 2
    assert "wattle energy report" in capsys.readouterr().err
