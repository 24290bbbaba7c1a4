"""Whole runs, each in processes of its own and all at once: the starters, and servers that misbehave."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.loadtests.fakes import ACTIVE_J, SETTLED_J, FakeServer

ROOT = Path(__file__).parent.parent.parent
PAGES: dict[str, str] = {}
"""What the web interface has shown."""
FAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "good": ({}, ["--rate", "20"]),
    "slow": ({"delay_s": 0.4}, ["--rate", "20"]),
    "failing": ({"fail_every": 4, "leak_j": 1.0, "streams": False}, ["--rate", "20"]),
    "dying": ({"die_after": 20}, ["--duration", "60s"]),
    "openai": ({"bills": False}, ["--dialect", "openai", "--model", "m"]),
    "huggingface": ({"bills": False}, ["--dialect", "huggingface"]),
}


@dataclass(frozen=True)
class Run:
    """What came of a run."""

    status: int
    out: str
    err: str
    folder: Path
    server: FakeServer | None

    @property
    def report(self) -> dict[str, Any]:
        """Its JSON."""
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """All runs, side by side: most of their time they wait."""
    folder = tmp_path_factory.mktemp("runs")
    with ExitStack() as stack:
        # A job in the background of a script ignores Ctrl-C, and so would whatever it starts.
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        started = {}
        for name, (how, flags) in FAKES.items():
            server = FakeServer(**how)
            stack.callback(server.close)
            load = [] if "--rate" in flags else ["--users", "3"]
            flags = ["--target", server.address, "--duration", "3s", "--settle-s", "1", *load, *flags]
            started[name] = (_start(folder / name, flags), server)
            stack.callback(_stop, started[name][0])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        watched = FakeServer()
        stack.callback(watched.close)
        flags = ["--target", watched.address, "--users", "2", "--duration", "3s", "--settle-s", "1"]
        web = _start(folder / "web", [*flags, "--web-port", port], headless=False)
        stack.callback(_stop, web)
        real = _start(folder / "real", ["--users", "3", "--duration", "10s", "--settle-s", "1", "--max-failures", "0"])
        stack.callback(_stop, real)
        found = {name: _finish(process, folder / name, server) for name, (process, server) in started.items()}
        PAGES.update(_use_web_interface(f"http://127.0.0.1:{port}"))
        os.killpg(web.pid, signal.SIGINT)
        found["web"] = _finish(web, folder / "web", watched)
        found["real"] = _finish(real, folder / "real", None)
        yield found


def _use_web_interface(address: str) -> dict[str, str]:
    """Start a run as the start button does, and return what a browser is shown during it and after it."""
    _await(f"{address}/")
    urllib.request.urlopen(f"{address}/swarm", data=b"user_count=1&spawn_rate=1").close()
    report = _await(f"{address}/wattle/report.html")
    pages = ("/", "/stats/requests", "/wattle/history", "/wattle/chart.js")
    return {"report": report, **{page: _await(address + page) for page in pages}}


def _await(url: str) -> str:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(url)


def _start(out: Path, flags: list[str], headless: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "wattle", "loadtest", "--scenario", "mixed", "--out", str(out), *flags]
    command += ["--headless"] if headless else []
    # Of two servers with the same state only one bills the machine's idle energy, and another may be running here.
    environment = {**os.environ, "XDG_STATE_HOME": str(out.parent / f"state-{out.name}")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str]) -> None:
    """Whatever has happened, nothing goes on after the tests; a run that is terminated stops what it has started."""
    if process.poll() is None:
        process.terminate()
        process.communicate()


def _finish(process: subprocess.Popen[str], folder: Path, server: FakeServer | None) -> Run:
    out, err = process.communicate(timeout=120)
    return Run(process.returncode, out, err, folder, server)


def test_the_starters_answer_all_five_tasks_and_every_joule_is_accounted_for(runs: dict[str, Run]) -> None:
    run = runs["real"]
    assert run.status == 0, run.out + run.err
    report = run.report
    assert set(report["tasks"]) == {"translate", "generate", "answer", "sentiment", "summarize"}
    for figures in report["tasks"].values():
        assert figures["queries"] > 0 and figures["without_bill"] == figures["unsettled"] == 0
        assert figures["allocated_j"]["mean"] >= figures["active_j"]["mean"] > 0
        assert figures["gco2e_per_1000"] > 0 and figures["quality"]
    assert report["tasks"]["translate"]["allocated_j_per_output_token"] > 0
    assert report["balance"]["holds"], report["balance"]
    assert len(report["power"]) >= 5 and all(watts > 0 for _, watts in report["power"])
    assert {model["bits"] for model in report["models"]} == {7, 8}
    assert "Conservation" in run.out and "report.html" in run.out
    assert "answers/s" in run.err, "a run shows that it goes on"


def test_bills_are_the_settled_ones(runs: dict[str, Run]) -> None:
    run = runs["good"]
    total = run.report["total"]
    assert (run.status, total["unsettled"], total["without_bill"], total["failed"]) == (0, 0, 0, 0), run.out
    assert run.report["tasks"]["translate"]["allocated_j"]["p99"] <= SETTLED_J
    assert total["quality"] == "measured"
    # Lists of texts cost what one text costs here, so each text's share is smaller.
    active = [each["active_j"] for each in run.report["requests"]]
    assert set(active) == {ACTIVE_J}
    assert run.report["balance"]["residual_j"] == 0.0
    with (run.folder / "summary.csv").open(encoding="utf-8") as file:
        assert [row["task"] for row in csv.DictReader(file)][-1] == "total"


def test_streams_know_their_first_token(runs: dict[str, Run]) -> None:
    streamed = [each for each in runs["good"].report["requests"] if each["streamed"]]
    assert streamed and all(each["ttft_ms"] is not None for each in streamed)
    assert all(each["output_tokens"] == 4 for each in streamed)


def test_locusts_interface_shows_joules(runs: dict[str, Run]) -> None:
    run = runs["web"]
    assert run.status == 0, run.err
    assert "Conservation" in run.out
    (table,) = json.loads(PAGES["/stats/requests"])["extended_stats"]
    total = table["data"][-1]
    assert (table["key"], total["name"], total["quality"]) == ("joules", "Aggregated", "measured")
    assert 0 < total["active_j"] < total["allocated_j"] <= SETTLED_J, "after the run, the settled bills are shown"
    assert '"key": "joules"' in PAGES["/"] and "wattle/chart.js" in PAGES["/"]
    assert json.loads(PAGES["/wattle/history"])[-1].keys() == {"at_s", "active_j", "allocated_j"}
    assert "wattle/history" in PAGES["/wattle/chart.js"]
    assert PAGES["report"].startswith("<!doctype html>")


def test_a_slow_server_does_not_slow_an_open_loop(runs: dict[str, Run]) -> None:
    slow, good = runs["slow"].report, runs["good"].report
    assert runs["slow"].status == 0, runs["slow"].out
    assert slow["total"]["latency_ms"]["p50"] >= 400
    # A closed loop would send fewer; the same seed brings the same arrivals to both.
    assert abs(len(slow["requests"]) - len(good["requests"])) <= 5
    assert max(window["in_flight"] for window in slow["windows"]) > 4


def test_failures_are_counted_and_end_with_1(runs: dict[str, Run]) -> None:
    run = runs["failing"]
    report = run.report
    assert run.status == 1
    assert report["failures"] == {"500: internal_error": sum(map(bool, (r["error"] for r in report["requests"])))}
    assert 0.2 < report["total"]["failed"] / report["total"]["requests"] < 0.3
    assert "requests failed" in run.out and "500: internal_error" in run.out
    assert not any(each["streamed"] for each in report["requests"])
    assert "streams were asked for in one piece" in run.out, "what the server cannot do is no failure"


def test_energy_that_the_bills_do_not_account_for_is_an_alarm(runs: dict[str, Run]) -> None:
    run = runs["failing"]
    found, answered = run.report["balance"], sum(each["error"] is None for each in run.report["requests"])
    assert not found["holds"]
    assert found["residual_j"] == answered * 1.0
    assert "Residual above 1% of the meter" in run.out


def test_a_server_that_dies_ends_the_run_with_1(runs: dict[str, Run]) -> None:
    run = runs["dying"]
    report = run.report
    assert run.status == 1
    assert report["died_at_s"] is not None and report["load_s"] < 30, "it did not go on to the end"
    assert "stopped answering" in run.out and "no answer" in run.out
    assert 0 < report["total"]["queries"] + 2 < report["total"]["requests"] + 2


@pytest.mark.parametrize(("name", "path"), [("openai", "/v1/chat/completions"), ("huggingface", "/")])
def test_other_dialects_are_measured_by_the_same_scenario_and_meter(
    runs: dict[str, Run], name: str, path: str
) -> None:
    run = runs[name]
    assert run.status == 0 and run.server is not None, run.out
    assert {asked for asked, _ in run.server.bodies} == {path}
    report = run.report
    assert report["total"]["allocated_j"] is None and report["balance"] is None
    assert report["total"]["without_bill"] == report["total"]["requests"]
    # All fakes of this file share a process, so what one of them takes above idle is anybody's.
    assert report["metered"]["energy_j"] >= report["metered"]["idle_j"] > 0
    assert report["metered"]["allocated_j_per_query"] > 0
    assert "No answer came with a bill" in run.out and "Energy by this machine's meter" in run.out
    if name == "openai":
        assert any(body.get("stream") for _, body in run.server.bodies)
        assert {body["model"] for _, body in run.server.bodies} == {"m"}
