"""The page on the method names what the code knows."""

import re
from enum import StrEnum
from pathlib import Path

import pytest

from energy.carbon import LIFE_YEARS
from energy.settlement import HORIZON_NS, IDLE_WINDOW_NS, Reason
from energy.types import Phase, Quality
from service.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.mark.parametrize("kind", [Reason, Phase, Quality])
def test_it_names_every_reason_phase_and_quality(kind: type[StrEnum]) -> None:
    assert {each.value for each in kind} <= CODE


def test_its_settings_and_files_exist() -> None:
    named = {name for name in CODE if re.fullmatch(r"WATTLE_[A-Z_]+", name)}
    assert named <= {f"WATTLE_{name.upper()}" for name in Settings.model_fields}
    paths = [name for name in CODE if name.startswith("energy/")] + re.findall(r"\]\(([^)]+)\)", PAGE)
    assert paths
    for name in paths:
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name


def test_its_figures_are_the_code_s() -> None:
    assert HORIZON_NS == 10 * 10**9 and "ten seconds" in PAGE
    assert IDLE_WINDOW_NS == 10**9 // 2 and "over at least half a second" in " ".join(PAGE.split())
    assert f"`WATTLE_LIFE_YEARS` | {LIFE_YEARS:g} |" in PAGE
