"""The same weights in every peer's form: made once, by each peer's own converter, in its own environment."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from loadtests.peers.environments import python_of
from loadtests.peers.processes import ROOT
from loadtests.peers.table import Peer, Variant, folder
from loadtests.peers.workloads import Shape

_OPTIMUM_TASKS = {
    "encode": "feature-extraction",
    "translate": "text2text-generation-with-past",
    "generate": "text-generation-with-past",
}


def make_sources(root: Path) -> str | None:
    """The models in Hugging Face's format; returns why they could not be made."""
    models, stamp = root / "models", root / "models.txt"
    if stamp.exists() and stamp.read_text() == digest():
        return None
    print("making the models", flush=True)
    for name in ("models", "converted", "references"):
        shutil.rmtree(root / name, ignore_errors=True)
    python = python_of(root, "huggingface")
    failure = _run([[str(python), "-m", "loadtests.peers.make_models", str(models)]], models, root)
    if failure is None:
        stamp.write_text(digest())
    return failure


def digest() -> str:
    """Of all that decides what models and inputs are: figures of another one are not to be mixed with these."""
    hashed = hashlib.sha256()
    for name in ("make_models.py", "workloads.py", "sentences.txt"):
        hashed.update((Path(__file__).parent / name).read_bytes())
    return hashed.hexdigest()


def convert(root: Path, peer: Peer, variant: Variant, shape: Shape) -> str | None:
    """The model of ``shape`` as ``variant`` reads it; returns why it could not be made. Takes up to minutes."""
    out = folder(root, shape, variant.artefact)
    stamp = out.with_name(out.name + ".done")
    if variant.artefact == "source" or stamp.exists():
        return None
    print(f"converting {shape.name} for {peer.title}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    failure = _run(list(_commands(root, variant.artefact, shape, out)), out, root)
    if failure is None:
        stamp.touch()
    return failure


def _commands(root: Path, artefact: str, shape: Shape, out: Path) -> Iterator[list[str]]:
    source, target = str(root / "models" / shape.name), str(out)
    sentences = str(root / "models" / "sentences.json")

    def script(environment: str, name: str) -> str:
        return str(python_of(root, environment).parent / name)

    def module(environment: str, name: str) -> list[str]:
        return [str(python_of(root, environment)), "-m", name]

    match artefact:
        case "wattle-rowwise" | "wattle-calibrated" | "wattle-calibrated7" | "wattle-blockwise8" | "wattle-blockwise4":
            scheme = artefact.removeprefix("wattle-").rstrip("478")
            bits = artefact[-1] if artefact[-1].isdigit() else "8"
            flags = ["--out", str(out.parent), "--name", out.name, "--scheme", scheme, "--bits", bits]
            if scheme == "calibrated":
                flags += ["--texts", str(root / "models" / "calibration.txt")]
            languages = ["--source-language", "en", "--target-language", "de"] if shape.kind == "translate" else []
            yield [*module("wattle", "wattle"), "import", source, *flags, *languages]
        case "onnx":
            task = _OPTIMUM_TASKS[shape.kind]
            yield [script("optimum", "optimum-cli"), "export", "onnx", "--model", source, "--task", task, target]
        case "ctranslate2":
            converter = script("ctranslate2", "ct2-transformers-converter")
            yield [converter, "--model", source, "--output_dir", target, "--quantization", "int8"]
        case "openvino":
            task, numbers = _OPTIMUM_TASKS[shape.kind], "fp32" if shape.kind == "encode" else "int8"
            export = [script("openvino", "optimum-cli"), "export", "openvino", "--model", source, "--task", task]
            # With its state inside, a decoder keeps that of another batch: beams fail or write something else.
            flags = ["--disable-stateful"] if shape.kind == "translate" else []
            yield [*export, "--library", "transformers", "--weight-format", numbers, *flags, target]
            if shape.kind == "encode":
                yield [*module("openvino", "loadtests.peers.make_openvino"), target, sentences]
        case "gguf":
            yield [*module("llamacpp", "loadtests.peers.make_gguf"), source, target]
        case "genai8" | "genai4":
            numbers = artefact.replace("genai", "int")
            builder = module("genai", "onnxruntime_genai.models.builder")
            yield [*builder, "-i", source, "-o", target, "-p", numbers, "-e", "cpu", "-c", str(root / "cache")]


def _run(commands: list[list[str]], out: Path, root: Path) -> str | None:
    log = root / "logs" / f"{out.parent.name}-{out.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    for command in commands:
        with log.open("wb") as file:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f"{lines[-1][:200] if lines else 'failed without a word'} ({log})"
    return None
