"""The examples for clients run as they stand, and print what the page says."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from tests.service.test_server import serve

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
# A block of code, and what it prints where the page shows it.
BLOCKS = re.findall(r"```(sh|python|js)\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)
KINDS = ("sh", "python", "js")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The starters, on a free port."""
    ledger = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with serve(1, "--ledger", str(ledger)) as (_, address, _):
        yield address


def run(kind: str, code: str, address: str) -> str:
    """What the code prints."""
    code = code.replace(ADDRESS, address)
    if kind == "python":
        with redirect_stdout(StringIO()) as printed:
            exec(code, {})
        return printed.getvalue()
    if kind == "js" and shutil.which("node") is None:
        pytest.skip("node is not installed")
    command = shlex.split(code) if kind == "sh" else ["node", "--input-type=module", "-e", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("kind", "code", "shown"), BLOCKS, ids=[kind for kind, _, _ in BLOCKS])
def test_an_example_prints_what_the_page_says(address: str, kind: str, code: str, shown: str) -> None:
    printed = run(kind, code, address)
    assert printed
    if shown:
        assert printed == shown


def test_the_streams_of_the_page_end_with_the_whole_answer(address: str) -> None:
    (stream,) = [code for kind, code, _ in BLOCKS if kind == "sh" and '"stream"' in code]
    *pieces, last = [
        json.loads(event.removeprefix("data: ")) for event in run("sh", stream, address).split("\n\n")[:-1]
    ]
    assert "".join(piece["delta"] for piece in pieces) == last["results"][0]["text"]
    assert last["energy"]["allocated_j"] > 0


def test_every_language_is_shown() -> None:
    assert {kind for kind, _, _ in BLOCKS} == set(KINDS)
