"""How much the engine may use, and take on. Reads no environment."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and the division of the machine."""

    executors: int = 1
    threads: int = 1
    """Of each executor."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """``cuda`` runs models on GPUs, ``auto`` those that GPUs run where there is one, and the others on the
    processor."""
    gpus: tuple[int, ...] = (0,)
    """Which, as NVIDIA counts them; one executor each."""
    max_rows: int = 128
    """Texts, or beams of texts, that an executor writes at once with one model."""
    max_batch_tokens: int = 512
    """Of one forward pass over new sequences, counted with padding."""
    max_model_bytes: int = 8_000_000_000
    """Of one model, its weights and its buffers; one that is large gets fewer rows, one that is larger is refused."""
    max_piece_tokens: int = 256
    """Of a prompt that one step reads; longer ones take turns with the texts that are being written."""
    prefix_bytes: int = 64_000_000
    """Of the beginnings of prompts that each executor keeps for each model; 0 keeps none."""
    reuse_bytes: int = 0
    """Of outputs that are kept for items that come again exactly alike; 0 computes every item."""
    max_waiting_items: int = 512
    max_waiting_tokens: int = 262_144
    key_share: float = 1.0
    """Of what may wait, how much may be one key's."""
