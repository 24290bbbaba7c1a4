"""Outputs of items that came before, for those that come again exactly alike. Pure bookkeeping."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from service.engine.types import EncodeItem, EncodeOutput, ExtractItem, Item, Output, Timing, WriteItem

_BYTES_PER_ID = 8
_OVERHEAD_BYTES = 500
"""Of an entry with its keys, about."""


class Reuse:
    """Keeps what was used last, up to ``max_bytes``; 0 keeps nothing. Its methods may be called from any thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Output, int]] = OrderedDict()
        """Outputs and how many bytes they count as."""
        self._lock = threading.Lock()

    def find(self, model: str, item: Item) -> Output | None:
        """The output of the same item to the same model, which no step is needed for."""
        key = self._key(model, item)
        if key is None:
            return None
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return replace(self._kept[key][0], timing=Timing(0, 0))

    def keep(self, model: str, item: Item, output: Output) -> None:
        """Remember an output, and forget those that were used longest ago."""
        key = self._key(model, item)
        if key is None:
            return
        with self._lock:
            if key in self._kept:
                return
            size = _OVERHEAD_BYTES + _BYTES_PER_ID * len(item.input_ids)
            size += (
                output.logits.nbytes if isinstance(output, EncodeOutput) else _BYTES_PER_ID * len(output.output_ids)
            )
            self._kept[key] = output, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= self._kept.popitem(last=False)[1][1]

    def _key(self, model: str, item: Item) -> Hashable | None:
        """None for an item whose output may differ the next time, or that somebody follows while it is computed."""
        if not self._max_bytes:
            return None
        match item:
            case WriteItem(input_ids=ids, sampling=sampling, should_stop=None, on_tokens=None):
                by_chance = sampling.beams == 1 and sampling.temperature > 0 and sampling.seed is None
                return None if by_chance else (model, ids, sampling)
            case EncodeItem(input_ids=ids, token_types=types, wants_vector=vector):
                return model, ids, types, vector
            case ExtractItem(input_ids=ids):
                return model, ids, ExtractItem
        return None
