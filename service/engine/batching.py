"""Which waiting sequences are computed together: pure functions of their lengths."""

from collections.abc import Sequence

_MULTIPLE = 4
# A step on a CPU costs its padded tokens and little besides, so padding is worth little more than this part of them.
_MOST_PADDING = 0.15


def padded_width(length: int) -> int:
    """How wide a batch is whose longest sequence has ``length`` tokens.

    A multiple of four: products of a single row, as in pooling, add in fours and then one by one, and over whole
    fours a sequence gets the same bits whatever stands beside it.
    """
    return -(-length // _MULTIPLE) * _MULTIPLE


def form_batch(lengths: Sequence[int], most: int, max_tokens: int) -> list[int]:
    """Choose up to ``most`` of the waiting sequences: the first, which has waited longest, and others of its length.

    Neighbours in order of length join, the nearest first, as long as the batch has no more than ``max_tokens``, padding
    included, and little padding; a sequence over ``max_tokens`` goes alone. Returns their places, in rising order.
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    low = order.index(0)
    high = low + 1
    longest = total = lengths[0]
    while high - low < most:
        shorter = lengths[order[low - 1]] if low > 0 else None
        longer = lengths[order[high]] if high < len(order) else None
        if shorter is None and longer is None:
            break
        # What each neighbour would add in padding: the shorter its own, the longer everybody's.
        take_longer = shorter is None or (
            longer is not None and (longer - longest) * (high - low) <= longest - shorter
        )
        joining = longer if take_longer else shorter
        assert joining is not None
        total += joining
        longest = max(longest, joining)
        padded = padded_width(longest) * (high - low + 1)
        if padded > max_tokens or longest * (high - low + 1) - total > _MOST_PADDING * total:
            break
        if take_longer:
            high += 1
        else:
            low -= 1
    return sorted(order[low:high])


def fair_share(waiting: int, running_here: int, running: int, executors: int) -> int:
    """How many waiting items an executor may take so that all executors end up with equally many.

    ``running`` counts the items of all executors, ``running_here`` those of the one that asks.
    """
    return max(0, -(-(waiting + running) // executors) - running_here)
