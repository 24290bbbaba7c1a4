"""Who is compared: the peers, the numbers they compute with, and the settings that each is tried at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers.worker import Load
from loadtests.peers.workloads import Kind, Shape


@dataclass(frozen=True, slots=True)
class Variant:
    """One way in which a peer stores and computes a model."""

    name: str
    kinds: tuple[Kind, ...]
    bits: int
    """That a stored weight takes: what a step has to read."""
    arithmetic: str
    """Whose rate is its ceiling: ``fp32``, ``bf16`` or ``int8``."""
    artefact: str
    """The folder with its model, below that of the shape."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    native_replicas: bool = False
    """Whether one process computes several batches side by side; else each replica is a process."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a peer divides the machine."""

    replicas: int
    threads: int
    batch_tokens: int

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.replicas} x {self.threads}" + (f", {self.batch_tokens}" if self.batch_tokens < 1 << 20 else "")


_ALL: tuple[Kind, ...] = ("encode", "translate", "generate")
_WRITERS: tuple[Kind, ...] = ("translate", "generate")
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "wattle",
            "Wattle",
            (
                Variant("rowwise", _ALL, 8, "int8", "wattle-rowwise"),
                Variant("calibrated", _ALL, 8, "int8", "wattle-calibrated"),
                Variant("calibrated 7 bits", _ALL, 8, "int8", "wattle-calibrated7"),
                Variant("blockwise", ("encode", "generate"), 8, "int8", "wattle-blockwise8"),
                Variant("blockwise 4 bits", ("generate",), 4, "int8", "wattle-blockwise4"),
            ),
            native_replicas=True,
        ),
        Peer(
            "huggingface",
            "Hugging Face",
            (Variant("fp32", _ALL, 32, "fp32", "source"), Variant("bf16", _ALL, 16, "bf16", "source")),
        ),
        Peer("optimum", "Optimum ORTModel", (Variant("fp32", _ALL, 32, "fp32", "onnx"),)),
        Peer("ctranslate2", "CTranslate2", (Variant("int8", _ALL, 8, "int8", "ctranslate2"),), native_replicas=True),
        Peer(
            "openvino",
            "OpenVINO",
            (
                Variant("int8", ("encode",), 8, "int8", "openvino"),
                Variant("bf16", ("encode",), 32, "bf16", "openvino"),
                Variant("int8 weights", _WRITERS, 8, "fp32", "openvino"),
            ),
            native_replicas=True,
        ),
        Peer(
            "llamacpp",
            "llama.cpp",
            (
                Variant("q8_0", ("generate",), 8, "int8", "gguf"),
                Variant("q4_0", ("generate",), 4, "int8", "gguf"),
            ),
        ),
        Peer(
            "genai",
            "onnxruntime-genai",
            (
                Variant("int8", ("generate",), 8, "int8", "genai8"),
                Variant("int4", ("generate",), 4, "int8", "genai4"),
            ),
        ),
    )
}
REFERENCE = (PEERS["huggingface"], PEERS["huggingface"].variants[0])
"""Whose outputs the others' are compared with."""
_UNLIMITED = 1 << 30


def settings(kind: Kind, peer: Peer, cores: int) -> list[Setting]:
    """Every division of ``cores`` into equal groups; for an encoder, with several sizes of a batch."""
    divisions = [(cores // threads, threads) for threads in range(1, cores + 1) if cores % threads == 0]
    # Two threads are one division of many on a large machine: those between the ends are tried as well.
    budgets: Sequence[int] = (512, 2048) if kind == "encode" else (512 if peer.name == "wattle" else _UNLIMITED,)
    return [Setting(replicas, threads, budget) for replicas, threads in divisions for budget in budgets]


def folder(root: Path, shape: Shape, artefact: str) -> Path:
    """Where a model in some form lies."""
    return root / "models" / shape.name if artefact == "source" else root / "converted" / shape.name / artefact


def order(root: Path, shape: Shape, variant: Variant, setting: Setting, cores: Sequence[int]) -> Load:
    """What a worker is told to load."""
    where = folder(root, shape, variant.artefact)
    return Load(
        str(where),
        shape.kind,
        variant.name,
        setting.threads,
        setting.replicas,
        setting.batch_tokens,
        tuple(cores[: setting.threads * setting.replicas]),
    )
