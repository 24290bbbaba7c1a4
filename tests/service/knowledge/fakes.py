"""Small real parts for the tests of knowledge bases: an engine that embeds by meaning, as far as a table knows it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.engine.types import EncodeOutput, Item, Overloaded, Ticket
from service.models import Model
from tests.service.fakes import TIMING

MEANINGS = (("paris", "capital", "france"), ("dog", "runs", "beach"), ("rains", "river"))
"""Words of one meaning share a direction."""


def embedder_of(model: Model, revision: str = "1") -> Model:
    """``model`` as if it ended in a vector; never written to disk, so that no manifest is checked."""
    config = model.manifest.config.model_copy(update={"head": "embed", "n_labels": 0})
    files = {"model.onnx": model.manifest.files["model.onnx"].model_copy(update={"sha256": revision})}
    manifest = model.manifest.model_copy(
        update={"name": "tiny-embed", "tasks": (), "config": config, "files": files, "labels": ()}
    )
    return replace(model, manifest=manifest)


class EmbeddingEngine:
    """Embeds at once: the counts of each meaning's words, and of all others."""

    def __init__(self, model: Model) -> None:
        words = model.tokenizer.get_vocab()
        self._directions = {words[word]: place for place, group in enumerate(MEANINGS) for word in group}
        self.items: list[Item] = []
        self.refusals = 0
        """How often the queue is still full."""

    def submit(self, model: str, items: Sequence[Item], key: str = "") -> list[Ticket]:
        if self.refusals:
            self.refusals -= 1
            raise Overloaded(retry_after_s=0.001)
        self.items += items
        tickets = [Ticket() for _ in items]
        for item, ticket in zip(items, tickets, strict=True):
            vector = np.zeros(len(MEANINGS) + 1, np.float32)
            for token in item.input_ids:
                vector[self._directions.get(token, -1)] += 1.0 if token in self._directions else 0.01
            ticket.future.set_result(EncodeOutput(vector, TIMING))
        return tickets
