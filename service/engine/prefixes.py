"""The beginnings of prompts that have been read lately, so that the next prompt that begins alike need not read them
again (a system prompt, the turns of a conversation). Pure bookkeeping."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

LEAST_TOKENS = 32
"""Fewer are as fast read as copied, beside the prompts of others."""

Memory = list[NDArray[np.float32]]
"""Keys and values, ``(heads, tokens, head size)`` each."""


class Prefixes:
    """Keeps what was used last, up to ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[tuple[int, ...], Memory] = OrderedDict()
        self._alike: defaultdict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        """Those that are kept, by their first tokens."""

    def keep(self, ids: Sequence[int], memory: Callable[[], Memory]) -> None:
        """Remember what a prompt's tokens left behind, unless a longer one that begins with them is known."""
        ids = tuple(ids)
        if not self._max_bytes or len(ids) < LEAST_TOKENS:
            return
        alike = self._alike[ids[:LEAST_TOKENS]]
        if any(known[: len(ids)] == ids for known in alike):
            return
        alike.append(ids)
        self._kept[ids] = memory()
        self._bytes += _size(self._kept[ids])
        while self._bytes > self._max_bytes:
            oldest, forgotten = self._kept.popitem(last=False)
            self._bytes -= _size(forgotten)
            self._alike[oldest[:LEAST_TOKENS]].remove(oldest)
            if not self._alike[oldest[:LEAST_TOKENS]]:
                del self._alike[oldest[:LEAST_TOKENS]]

    def find(self, ids: Sequence[int]) -> Memory:
        """What is known of the beginning of a prompt; empty where that is not worth it.

        Its last token is never known: reading it gives the next one. A beginning pays where it is at least half of
        the prompt, as the rest is then read without company.
        """
        best: tuple[int, ...] = ()
        length = 0
        for known in self._alike.get(tuple(ids[:LEAST_TOKENS]), ()):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, ids[:-1], strict=False)))
            if shared > length:
                best, length = known, shared
        if length < max(LEAST_TOKENS, len(ids) // 2):
            return []
        self._kept.move_to_end(best)
        return [part[:, :length] for part in self._kept[best]]


def _size(memory: Memory) -> int:
    return sum(part.nbytes for part in memory)
