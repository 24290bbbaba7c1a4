"""How the energy of a step is shared among its requests: pure functions. Knows nothing of meters.

A forward pass over n requests costs ``F + m * sum(work)``. Request i is charged ``F/n + m * work_i``, which is the
Shapley value of that affine cost, rescaled so that the charges sum to the energy that the meter saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from energy.types import Phase, Shares, Step, Work

Integers = NDArray[np.int64]
Weights = tuple[int, int, int]
"""What a pass costs however small it is, each token that it computes, and each that it finds in the buffers."""
_WORD_BITS = 62
"""A product of so many bits is exact in 64."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The affine cost of a step; only its proportions matter, for charges are rescaled to the measured energy.

    ``wattle calibrate`` measures them for a model and a machine.
    """

    fixed: int = 4096
    """F, never 0: what a forward pass costs however small it is. By default four tokens' worth: step times of decoders
    from 25 to 135 million parameters on two cores, at batch 1, 4, 8 and 32, fit between one and twelve."""
    prefill_token: int = 1024
    """m for one token of a text that is read."""
    decode_token: int = 1024
    """m for one token of a text that is written."""
    context_token: int = 8
    """m for one token already in the buffers, which attention reads again: between a 125th and a 210th of a token
    written in the starters that write."""

    def of(self, phase: Phase) -> Weights:
        """By what requests share steps of this phase."""
        token = self.decode_token if phase is Phase.DECODE else self.prefill_token
        return self.fixed, token, self.context_token


DEFAULTS = Coefficients()
UNCALIBRATED: Mapping[str, Coefficients] = MappingProxyType({})
"""Of no model anything is known."""


def share_load(load_ns: int, work: Work, passes: int, weights: Weights) -> Shares:
    """Share the load of a step in proportion to ``F / n + m * work_i``, the mean of all of its passes. Its requests
    differ by tokens in the buffers, or by computed ones where nobody has such."""
    (fixed, token, context), tokens, found = weights, work.tokens, work.context_tokens
    # Every pass finds what those before it have computed.
    n, mean_token = len(tokens), token + context * (passes - 1) / 2
    if found:
        even = fixed + n * mean_token * tokens[0]
        ns_per_weight = load_ns / (n * (even + context * sum(found)))
        return ns_per_weight * even, ns_per_weight * n * context, found
    ns_per_weight = load_ns / (n * (fixed + mean_token * sum(tokens)))
    return ns_per_weight * fixed, ns_per_weight * n * mean_token, tokens


def share_loads(steps: Sequence[Step]) -> Integers:
    """What falls to each of the requests of ``steps``, to the nanosecond; those of one step stand behind those of the
    other. All is done at once: what is done for each of so many finds nothing in the caches."""
    even_ns, each_ns, own = zip(*[step.shares for step in steps], strict=True)
    counts = list(map(len, own))
    tokens = np.fromiter(chain.from_iterable(own), np.int64, sum(counts))
    shares: Integers = np.rint(np.repeat(even_ns, counts) + np.repeat(each_ns, counts) * tokens).astype(np.int64)
    return shares


def split(totals: Sequence[int], weights: Sequence[Integers]) -> Integers:
    """Share each of ``totals`` in proportion to its ``weights``, in whole units that sum to it exactly (largest
    remainder). Returns the shares of one total behind those of the other.

    Of two with the same remainder the first comes first. ``weights`` are not negative; where all are zero, all are
    alike. All is done at once: so many calls to NumPy take as long for one total as for ten.
    """
    if not totals:
        return np.zeros(0, np.int64)
    counts = np.array([len(each) for each in weights])
    firsts = np.cumsum(counts) - counts
    heavy = np.concatenate(weights)
    wholes = np.add.reduceat(heavy, firsts)
    if not wholes.all():
        heavy = np.where(np.repeat(wholes, counts), heavy, 1)
        wholes = np.add.reduceat(heavy, firsts)
    is_exact = max(totals).bit_length() + int(wholes.max()).bit_length() <= _WORD_BITS
    kind = np.int64 if is_exact else np.object_
    amounts = np.array(totals, kind)
    products, divisors = np.repeat(amounts, counts) * heavy.astype(kind), np.repeat(wholes.astype(kind), counts)
    shares = products // divisors
    rests = products - shares * divisors
    left = amounts - np.add.reduceat(shares, firsts)
    # One total behind the other, in each the largest rest first.
    order = np.argsort(-rests, kind="stable")
    order = order[np.argsort(np.repeat(np.arange(len(counts)), counts)[order], kind="stable")]
    shares[order] += np.arange(len(heavy)) - np.repeat(firsts, counts) < np.repeat(left, counts)
    exact: Integers = shares.astype(np.int64)
    return exact
