"""Which waiting sequences are computed together: pure functions of their lengths."""

import math
from collections.abc import Sequence

_MULTIPLE = 4
# A step on a CPU costs its tokens, padded or not, and as much as a few more for being a step. So joining is worth
# about that many padding tokens for each sequence that needs no step of its own, and a little for its wider products.
_STEP_IN_TOKENS = 4
PADDING_SHARE = 0.15
PACKED_PADDING_SHARE = 1.0
"""Where only attention sees the padding, a sixth of the work of short sequences."""


def padded_width(length: int) -> int:
    """How wide a batch is whose longest sequence has ``length`` tokens.

    A multiple of four: products of a single row, as in pooling, add in fours and then one by one, and over whole
    fours a sequence gets the same bits whatever stands beside it.
    """
    return -(-length // _MULTIPLE) * _MULTIPLE


def form_batch(
    lengths: Sequence[int],
    most: int,
    max_tokens: int,
    padding_share: float = PADDING_SHARE,
    share_tokens: float = math.inf,
) -> list[int]:
    """Choose up to ``most`` of the waiting sequences: the first, which has waited longest, and others of its length.

    Neighbours in order of length join, the nearest first, as long as padding is no more than about ``padding_share``
    of the real tokens and both together no more than ``max_tokens``; a sequence over that goes alone. They stop where
    the real tokens are nearest to ``share_tokens``. Returns their places, in rising order.
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    low = order.index(0)
    high = low + 1
    longest = total = lengths[0]
    while high - low < min(most, len(order)):
        count = high - low
        # What the next neighbours would add in padding: a shorter one its own, a longer one everybody's.
        shorter = longest - lengths[order[low - 1]] if low > 0 else math.inf
        longer = (lengths[order[high]] - longest) * count if high < len(order) else math.inf
        joining = lengths[order[high if longer <= shorter else low - 1]]
        if total + joining - share_tokens > share_tokens - total:
            break
        longest, total = max(longest, joining), total + joining
        padding = longest * (count + 1) - total
        if padding > padding_share * total + _STEP_IN_TOKENS * count:
            break
        if padded_width(longest) * (count + 1) > max_tokens:
            break
        if longer <= shorter:
            high += 1
        else:
            low -= 1
    return sorted(order[low:high])


def fair_share(waiting: int, running_here: int, running: int, executors: int) -> int:
    """How much of what waits an executor may take so that all executors end up with equally much.

    ``running`` is what all executors have, ``running_here`` what the one has that asks; in items or in tokens.
    """
    return max(0, -(-(waiting + running) // executors) - running_here)
