"""The dependencies: exact, and apart where they must be."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
BASE: list[str] = PROJECT["dependencies"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[=]", requirement)[0] for requirement in requirements}


def test_every_requirement_is_pinned_exactly() -> None:
    every = [*BASE, *(requirement for extra in EXTRAS.values() for requirement in extra)]
    assert [each for each in every if not re.fullmatch(r"[a-z0-9-]+(\[[a-z,]+\])?==\d+(\.\d+)*", each)] == []
    assert "torch==2.13.0" in EXTRAS["train"]


def test_extras_that_meet_in_one_environment_agree() -> None:
    together = {*BASE, *(each for name, extra in EXTRAS.items() if name != "optimum" for each in extra)}
    assert len(together) == len(names(list(together)))


def test_the_base_holds_no_runtime_and_serving_no_torch() -> None:
    assert not names(BASE) & {"onnxruntime", "onnxruntime-gpu", "torch", "transformers"}
    for runtime in ("cpu", "gpu"):
        assert not names(EXTRAS[runtime]) & {"torch", "transformers"}
    assert names(EXTRAS["cpu"]) & {"onnxruntime", "onnxruntime-gpu"} == {"onnxruntime"}
    assert names(EXTRAS["gpu"]) & {"onnxruntime", "onnxruntime-gpu"} == {"onnxruntime-gpu"}


def test_every_folder_of_code_is_a_package() -> None:
    """A folder without an ``__init__.py`` would be left out of a wheel without a word."""
    parts = ("energy", "models", "training", "service", "loadtests")
    folders = {path.parent for part in parts for path in (ROOT / part).rglob("*.py")}
    assert [folder.relative_to(ROOT).as_posix() for folder in folders if not (folder / "__init__.py").exists()] == []
