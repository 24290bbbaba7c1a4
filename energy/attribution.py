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

from energy.types import Phase, Step, Weights

Integers = NDArray[np.int64]
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


def share_load(step: Step) -> tuple[float, float, Sequence[int]]:
    """What falls to a request of the load of its step, in proportion to ``F / n + m * work_i``, the mean of all
    passes: nanoseconds in any case, nanoseconds for each token by which requests differ, and how many of those each
    has. They are tokens in the buffers, or computed ones where nobody has such."""
    work, (fixed, token, context) = step.work, step.weights
    assert work is not None
    tokens, found = work.tokens, work.context_tokens
    # Every pass finds what those before it have computed.
    n, mean_token = len(tokens), token + context * (step.passes - 1) / 2
    if found:
        ns_per_weight = step.load_ns / (n * (fixed + mean_token * sum(tokens) + context * sum(found)))
        return ns_per_weight * (fixed + n * mean_token * tokens[0]), ns_per_weight * n * context, found
    ns_per_weight = step.load_ns / (n * (fixed + mean_token * sum(tokens)))
    return ns_per_weight * fixed, ns_per_weight * n * mean_token, tokens


def share_loads(steps: Sequence[Step]) -> Integers:
    """What falls of the load of each of ``steps`` to each of its requests, as ``share_load`` says, to the nanosecond;
    those of one step stand behind those of the other. All is done at once: what is done for each of so many finds
    nothing in the caches."""
    works = [step.work for step in steps if step.work is not None]
    counts = [len(work.tokens) for work in works]
    own = np.fromiter(chain.from_iterable([work.tokens for work in works]), np.int64, sum(counts))
    looked_back = [work.context_tokens or [0] * count for work, count in zip(works, counts, strict=True)]
    found = np.fromiter(chain.from_iterable(looked_back), np.int64, len(own))
    fixed, token, context = np.array([step.weights for step in steps]).T
    more, n = np.array([(step.passes - 1) / 2 for step in steps]), np.array(counts)
    each = np.repeat(np.arange(len(n)), n)
    weights = fixed[each] + (n * (token + context * more))[each] * own + (n * context)[each] * found
    wholes = np.add.reduceat(weights, np.cumsum(n) - n)
    shares: Integers = np.rint(weights * (np.array([step.load_ns for step in steps]) / wholes)[each]).astype(np.int64)
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
