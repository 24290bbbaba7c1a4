"""The README tells the truth: its commands run, its answers come back, its scores are the manifests'."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.manifest import read_manifest
from service.tasks import TASKS
from training.frontier import HEADLINE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STARTERS = ROOT / "models" / "starters"
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = [
    command.strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for command in re.split(r"\n(?=\S)", block)
]
CURLS = [command for command in COMMANDS if command.startswith("curl ")]
MAX_STARTERS_BYTES = 64_000_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The starters, served as `make serve` does, on a free port."""
    state = tmp_path_factory.mktemp("state")
    command = [sys.executable, "-m", "wattle", "serve", "--port", "0", "--state", str(state)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        (address,) = re.findall(r"http://\S+", server.stdout.readline())
        yield address
        server.send_signal(signal.SIGTERM)
        # Having finished, uvicorn ends as the signal asked.
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def run(command: str, address: str) -> str:
    arguments = shlex.split(command.replace(ADDRESS, address))
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout


def test_there_is_a_curl_for_every_task() -> None:
    asked = [re.search(r"/v1/(\w+)", command) for command in CURLS]
    assert {found[1] for found in asked if found} >= {task.name for task in TASKS}


@pytest.mark.parametrize("command", CURLS, ids=lambda command: command.split(ADDRESS)[1].split()[0])
def test_a_curl_is_answered_with_its_energy(address: str, command: str) -> None:
    headers, _, body = run(f"{command} -sS -i", address).partition("\n\n")
    for name in ("x-energy-joules", "x-energy-gco2e"):
        assert float(re.findall(rf"(?im)^{name}: (\S+)", headers)[0]) > 0
    answer = json.loads(body)
    assert answer["results"], answer
    assert all(result.get("text", result.get("answer", result.get("label"))) for result in answer["results"])
    energy = answer["energy"]
    assert energy["active_j"] > 0
    assert energy["allocated_j"] >= energy["active_j"]
    assert energy["gco2e"] > 0
    assert energy["quality"] in ("measured", "apportioned", "estimated")


def test_the_answer_shown_is_what_comes(address: str) -> None:
    """The first curl's answer in the README, figures that vary from run to run aside."""
    shown = json.loads(re.findall(r"```json\n(.*?)```", README, re.DOTALL)[0])
    came = json.loads(run(CURLS[0] + " -sS", address))
    assert came.keys() == shown.keys()
    assert (came["model"], came["usage"]) == (shown["model"], shown["usage"])
    for result, wanted in zip(came["results"], shown["results"], strict=True):
        assert result == pytest.approx(wanted, abs=0.01)
    assert came["energy"].keys() == shown["energy"].keys()


@pytest.mark.parametrize("folder", sorted(STARTERS.iterdir()), ids=lambda folder: folder.name)
def test_the_table_gives_the_measured_scores(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.scores, "run `wattle evaluate --write`"
    (row,) = re.findall(rf"^\| `{manifest.name}` \|.*$", README, re.MULTILINE)
    assert f"| {manifest.size_bytes / 1e6:.1f} |" in row
    card = (folder / "README.md").read_text(encoding="utf-8")
    numbers = {float(number) for number in re.findall(r"\b\d+\.\d\d\b", row)}
    for score in manifest.scores:
        assert f"| {score.metric} | {score.value:.2f} |" in card
    assert numbers, "the README gives no score"
    assert numbers <= {round(score.value, 2) for score in manifest.scores}, "a figure that nobody measured"


@pytest.mark.parametrize("folder", sorted(STARTERS.iterdir()), ids=lambda folder: folder.name)
def test_what_quality_costs_is_what_was_measured(folder: Path) -> None:
    manifest = read_manifest(folder)
    cells = []
    for scheme, bits in (("none", 32), (manifest.quantisation.scheme, manifest.quantisation.bits), ("blockwise", 4)):
        found = manifest.stored_as(scheme, bits)
        assert found is not None, "run `wattle quantise --write`"
        score = next(score for score in found.scores if score.metric == HEADLINE[manifest.tasks[0]])
        cells.append(f"{score.value:.2f} at {found.active_j_per_query:.3g} J")
    what = f"{score.metric}, {score.rows:,} rows of {score.data.split('/')[1]}"
    assert f"| {manifest.name} | {what} | {' | '.join(cells)} |" in README


def test_make_knows_the_commands() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"serve", "test"} <= named <= targets


def test_the_starters_stay_small() -> None:
    assert sum(path.stat().st_size for path in STARTERS.rglob("*")) < MAX_STARTERS_BYTES


def test_every_setting_is_documented() -> None:
    from energy.settings import ENV_PREFIX as REPORT_PREFIX
    from energy.settings import Settings as ReportSettings
    from service.settings import ENV_PREFIX, Settings
    from training.settings import ENV_PREFIX as TRAINING_PREFIX
    from training.settings import Settings as TrainingSettings

    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    known |= {TRAINING_PREFIX + name.upper() for name in TrainingSettings.model_fields}
    known |= {REPORT_PREFIX + name.upper() for name in ReportSettings.model_fields}
    documented = set(re.findall(r"`(WATTLE_\w+)`", (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")))
    assert documented == known
