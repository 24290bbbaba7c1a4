"""How much the engine may use, and take on. Reads no environment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and the division of the machine."""

    executors: int = 1
    threads: int = 1
    """Of each executor."""
    max_rows: int = 32
    """Texts, or beams of texts, that an executor writes at once with one model."""
    max_batch_tokens: int = 2048
    """Of one forward pass over new sequences, counted with padding."""
    max_waiting_items: int = 512
    max_waiting_tokens: int = 262_144
