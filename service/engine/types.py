"""What tasks and the engine exchange: token ids in, arrays or token ids out. Knows nothing of text or HTTP."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from energy.types import Load

FinishReason = Literal["stop", "length", "energy_budget"]
ShouldStop = Callable[[Sequence[int]], bool | FinishReason]
"""Called on the executor with the ids written so far; True (stop strings) or a reason ends the text. A beam search
calls it with one of its beams, and only a reason ends it."""


@dataclass(frozen=True, slots=True)
class EncodeItem:
    """One sequence for an encoder."""

    request_id: str
    input_ids: tuple[int, ...]
    token_types: tuple[int, ...] = ()
    """One per input id; empty means all zero."""
    wants_vector: bool = False
    """Whether the text's vector is wanted instead of the logits; the logits of an embed head are one."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. ``beams > 1`` is beam search and ignores the other choices."""

    max_tokens: int
    beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    seed: int | None = None
    """None draws a fresh seed."""
    no_repeat_ngram: int = 0
    logprobs: int | None = None
    """How many of the likeliest tokens are told at every place, beside the one chosen; None tells nothing."""


@dataclass(frozen=True, slots=True)
class WriteItem:
    """One text to be written from a source (encoder-decoder, prefix LM) or a prompt (decoder)."""

    request_id: str
    input_ids: tuple[int, ...]
    sampling: Sampling
    should_stop: ShouldStop | None = None
    on_tokens: Callable[[Sequence[int]], None] | None = None
    """Called on the executor with the ids written so far, at every new one; they grow, so what is kept is copied.
    A beam search knows its text only at the end, and never calls it."""


@dataclass(frozen=True, slots=True)
class ExtractItem:
    """One document of which a prefix LM scores every token as the start of a sentence to extract."""

    request_id: str
    input_ids: tuple[int, ...]


Item = EncodeItem | WriteItem | ExtractItem


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one item went."""

    queue_ns: int
    """From submission to the item's first step."""
    compute_ns: int
    """Sum of the durations of the steps that the item took part in."""
    load: Load | None = None
    """What fell to it of those; None where nothing was computed."""


@dataclass(frozen=True, slots=True)
class EncodeOutput:
    """``logits`` is float32: ``(labels,)`` for a classify head, ``(tokens, 2)`` for a span head (start, end),
    ``(tokens,)`` for an extract head; for an item that wants it, its vector ``(width,)``."""

    logits: NDArray[np.float32]
    timing: Timing


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found one token of a text, before temperature and what else narrows the choice."""

    logprob: float
    """Natural logarithm of the chosen token's probability."""
    likeliest: tuple[tuple[int, float], ...]
    """Tokens and their logarithms, the likeliest first; the chosen one need not be among them."""


@dataclass(frozen=True, slots=True)
class WriteOutput:
    """The ids written, without the end-of-text id."""

    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    timing: Timing
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per id where the item's sampling asks for them."""


Output = EncodeOutput | WriteOutput


class Answer(Future["Output"]):
    """A future whose cancellation is seen without taking its lock."""

    cancellations: ClassVar[int] = 0
    """Grows with every cancellation of any answer: as long as it stays, nobody need look at each of them."""
    is_cancelled = False

    def cancel(self) -> bool:
        """See ``Future.cancel``."""
        cancelled = super().cancel()
        if cancelled:
            self.is_cancelled = True
            # Two threads may count as one: whoever sees the number change sees both.
            Answer.cancellations += 1
        return cancelled


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted item: wait for ``future``; ``future.cancel()`` frees its place before the next step."""

    future: Answer = field(default_factory=Answer)


class Overloaded(Exception):
    """The queue is full; ``retry_after_s`` is computed from the backlog."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the service is overloaded; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


class EngineClosed(Exception):
    """The engine is draining and takes no more work."""


class EngineFailed(EngineClosed):
    """The engine has stopped of itself, and only another process can go on."""

    def __init__(self, device: str) -> None:
        super().__init__(f"{device} has failed, and nothing is computed any more until the service is started anew")
