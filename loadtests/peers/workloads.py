"""What is measured: the shapes of the models, and the batches that they compute. Knows nothing of who computes them.

Needs only the standard library: every peer's environment reads it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["encode", "translate", "generate"]
Ids = list[list[int]]
_SEED = 20261123


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of one model; its matrices alone decide what a token costs at least."""

    name: str
    kind: Kind
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    n_encoder_layers: int
    n_decoder_layers: int
    vocab_size: int

    @property
    def source_parameters(self) -> int:
        """Weights that one token of a source is multiplied with, the keys and values for the decoder included."""
        d = self.d_model
        cross = 2 * d * d * self.n_decoder_layers if self.n_encoder_layers else 0
        return self.n_encoder_layers * (4 * d * d + 2 * d * self.d_ff) + cross

    @property
    def target_parameters(self) -> int:
        """Weights that one written token is multiplied with, the output layer included."""
        if self.kind == "encode":
            return 0
        d = self.d_model
        if self.kind == "translate":
            # Own queries, keys, values and output; queries and output of the attention to the source; feed-forward.
            layer = 6 * d * d + 2 * d * self.d_ff
        else:
            layer = 2 * d * d + 2 * d * d * self.n_kv_heads // self.n_heads + 3 * d * self.d_ff
        return self.n_decoder_layers * layer + d * self.vocab_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("translate-6x6-512", "translate", 512, 2048, 8, 8, 6, 6, 32_000),
        Shape("translate-6x2-256", "translate", 256, 1536, 8, 8, 6, 2, 32_000),
        Shape("generate-135m", "generate", 576, 1536, 9, 3, 0, 30, 49_152),
        Shape("generate-25m", "generate", 384, 1024, 6, 2, 0, 12, 16_384),
        Shape("minilm", "encode", 384, 1536, 12, 12, 6, 0, 30_522),
    )
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One batch, submitted at once and timed until its last answer."""

    name: str
    shape: Shape
    at_once: int
    beams: int = 1
    source_tokens: int = 0
    """Of every row; 0 where the rows are sentences of any length."""
    new_tokens: int = 0
    """What every text is long: the end of a text never wins."""

    def rows(self, sentences: Sequence[Sequence[int]]) -> Ids:
        """The input ids. ``sentences`` are the tokenised sentences that encoders read, with their frame."""
        if self.shape.kind != "encode":
            return random_rows(self.shape, self.at_once, self.source_tokens)
        if not self.source_tokens:
            return [list(row) for row in sentences[: self.at_once]]
        return [joined(sentences, first, self.source_tokens) for first in range(self.at_once)]


def random_rows(shape: Shape, count: int, length: int) -> Ids:
    """``count`` rows of ``length`` ids; the sources of a translation end with their end-of-text id, 0."""
    # The last id is the padding, the first three are other special ids.
    generator = random.Random(f"{_SEED} {shape.name} {length}")
    words = length - (shape.kind == "translate")
    end = [0] if shape.kind == "translate" else []
    return [[generator.randrange(3, shape.vocab_size - 1) for _ in range(words)] + end for _ in range(count)]


def joined(sentences: Sequence[Sequence[int]], first: int, length: int) -> list[int]:
    """Sentences from number ``first`` on as one row of exactly ``length`` ids, in one frame."""
    begin, end = sentences[0][0], sentences[0][-1]
    ids: list[int] = []
    number = first
    while len(ids) < length - 2:
        ids += sentences[number % len(sentences)][1:-1]
        number += 1
    return [begin, *ids[: length - 2], end]


def _translations(shape: Shape) -> list[Workload]:
    return [
        Workload(f"{shape.name} {how} {at_once}", shape, at_once, beams, source_tokens=20, new_tokens=20)
        for how, beams in (("greedy", 1), ("beam4", 4))
        for at_once in (1, 8, 32)
    ]


def _generations(shape: Shape, new_tokens: int) -> list[Workload]:
    return [
        Workload(f"{shape.name} {at_once}", shape, at_once, source_tokens=64, new_tokens=new_tokens)
        for at_once in (1, 4, 8)
    ]


WORKLOADS = (
    *_translations(SHAPES["translate-6x6-512"]),
    *_translations(SHAPES["translate-6x2-256"]),
    # Half as many, so that the slowest peers are done in reasonable time.
    *_generations(SHAPES["generate-135m"], new_tokens=32),
    *_generations(SHAPES["generate-25m"], new_tokens=64),
    *(Workload(f"minilm ragged {at_once}", SHAPES["minilm"], at_once) for at_once in (1, 8, 16, 128)),
    Workload("minilm 32x128", SHAPES["minilm"], 32, source_tokens=128),
)
