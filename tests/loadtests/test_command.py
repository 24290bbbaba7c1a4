"""The command: wrong questions end with status 2, worse runs with 1, and gevent stays out of this process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import wattle
from tests.loadtests.test_compare import run

ROOT = Path(__file__).parent.parent.parent


def said(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    assert wattle.main(["loadtest", *arguments]) == status
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--target", "http://192.0.2.1"], "--allow-remote"),
        (["--target", "http://127.0.0.1:1"], "is the server up?"),
        (["--scenario", "mxed"], "mixed"),
        (["--users", "0"], "users"),
        (["--tasks", "dance"], "dance"),
        (["--target", "http://127.0.0.1:1", "--set", "threads=1"], "leave out --target"),
        (["--set", "threads"], "threads=1,2"),
        (["--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["sweep", "--set", "threads=1", "--set", "threads=2"], "each setting once"),
        (["compare", "/no/such/report", "/no/such/report"], "/no/such/report"),
    ],
)
def test_a_wrong_question_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    flags = [] if arguments[0] == "compare" else ["--out", str(tmp_path)]
    message = said(capsys, 2, *arguments, *flags)
    assert complaint in message and message.count("\n") == 1


@pytest.mark.parametrize("flags", [["--users", "1", "--rate", "1"], ["--duration", "soon"], ["--max-failures", "2"]])
def test_flags_that_cannot_be_read_end_with_2(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wattle.main(["loadtest", *flags])


def test_a_server_that_does_not_start_is_quoted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = said(capsys, 1, "--set", "threads=many", "--out", str(tmp_path))
    assert "did not start" in message and "threads" in message


def report(folder: Path, name: str, found: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps({"format": 1, **found}), encoding="utf-8")
    return str(path)


def test_compare_guards_joules(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    a, b = report(tmp_path, "a.json", run()), report(tmp_path, "b.json", run(1.5, seed=1))
    assert wattle.main(["loadtest", "compare", a, a]) == 0
    assert "Nothing is worse" in capsys.readouterr().out
    message = said(capsys, 1, "compare", a, b, "--max-regression", "0.2")
    assert "total: allocated J/query is 1.4" in message and "latency p95" in message
    assert said(capsys, 0, "compare", a, b, "--max-regression", "0.7") == ""
    other = report(tmp_path, "other.json", run(users=8))
    assert "differ in their load" in said(capsys, 2, "compare", a, other)


def test_the_command_leaves_gevent_and_locust_to_their_own_process() -> None:
    script = "import sys, loadtests.command\nprint(*sorted({'gevent', 'locust'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr


def test_every_flag_is_documented() -> None:
    documented = (ROOT / "docs" / "loadtesting.md").read_text(encoding="utf-8")
    for command in ([], ["compare"], ["sweep"]):
        result = subprocess.run(
            [sys.executable, "-m", "wattle", "loadtest", *command, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        flags = {word.strip("[],") for word in result.stdout.split() if word.strip("[],").startswith("--")}
        assert flags and [flag for flag in sorted(flags - {"--help"}) if f"`{flag}" not in documented] == []
