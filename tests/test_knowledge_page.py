"""The page on knowledge bases tells the truth: its session runs, and what it shows is what comes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VARYING = {"id", "energy", "timings"}


def lines(text: str) -> list[dict[str, Any]]:
    """Each line of JSON, without what differs from run to run."""
    return [
        {key: value for key, value in json.loads(line).items() if key not in VARYING} for line in text.splitlines()
    ]


def test_the_session_gives_what_it_shows(tmp_path: Path) -> None:
    came = session("knowledge.md", "answer-en", tmp_path)
    assert json.loads(came[-2])["results"][0]["abstained"]


def session(page: str, starter: str, folder: Path) -> list[str]:
    """What the blocks of a page print with one starter served; what the page shows must be what comes."""
    places = ["--state", str(folder / "state"), "--models", str(ROOT / "models" / "starters" / starter)]
    command = [sys.executable, "-m", "wattle", "serve", "--port", "0", *places]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
        came: list[str] = []
        for number, (kind, block) in enumerate(blocks):
            if kind == "sh":
                script = block.replace("http://127.0.0.1:8000", address).replace("\ncurl", "\necho; curl")
                run = subprocess.run(
                    ["bash", "-e"], input=script, cwd=folder, capture_output=True, text=True, check=True, timeout=60
                )
                came.append("\n".join(filter(None, run.stdout.splitlines())))
                assert lines(came[-1])
                assert '"error"' not in came[-1]
            else:
                assert blocks[number - 1][0] == "sh"
                for wanted, found in zip(lines(block), lines(came[-1]), strict=True):
                    assert _near(found, wanted), found
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    return came


def _near(found: Any, wanted: Any) -> bool:
    """Equal but for the last digits of numbers, which differ between processors."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_near(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_near, found, wanted))
    return bool(abs(found - wanted) < 0.02) if isinstance(wanted, float) else bool(found == wanted)
