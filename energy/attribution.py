"""How the energy of a step is shared among its requests: pure integer functions. Knows nothing of meters.

A step of n requests costs ``F + m * sum(work)``. Request i is charged ``F/n + m * work_i``, which is the Shapley
value of that affine cost, rescaled so that the charges sum to the energy that the meter saw.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from energy.types import Phase, Work

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The affine cost of a step; only its proportions matter, for charges are rescaled to the measured energy.

    ``wattle calibrate`` measures them for a model and a machine.
    """

    fixed: int = 4096
    """F: what a step costs however small it is. By default four tokens' worth: step times of decoders from 25 to
    135 million parameters on two cores, at batch 1, 4, 8 and 32, fit between one and twelve."""
    prefill_token: int = 1024
    """m for one token of a text that is read."""
    decode_token: int = 1024
    """m for one token of a text that is written."""
    context_token: int = 8
    """m for one token already in the buffers, which attention reads again: between a 125th and a 210th of a token
    written in the starters that write."""


DEFAULTS = Coefficients()
_WHOLE = 1 << 30


def weigh(work: Sequence[Work], coefficients: Coefficients) -> list[int]:
    """One integer weight per entry, in proportion to ``F/n + m * work_i``."""
    n, decode = len(work), Phase.DECODE
    fixed, context = coefficients.fixed, n * coefficients.context_token
    written, read = n * coefficients.decode_token, n * coefficients.prefill_token
    return [
        fixed + (written if phase is decode else read) * tokens + context * context_tokens
        for _, phase, tokens, context_tokens in work
    ]


def fractions(work: Sequence[Work], coefficients: Coefficients) -> list[int]:
    """The weights in units of 2**-30 of the step; equal ones where nothing has any weight."""
    if len(work) == 1:
        return [_WHOLE]
    weights = weigh(work, coefficients)
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    return [weight * _WHOLE // whole for weight in weights]


def split(total: int, weights: Sequence[int], keys: Sequence[Any]) -> list[int]:
    """Share ``total`` in proportion to ``weights``, in whole units that sum to it exactly (largest remainder).

    Ties go to the smaller key, so that the order of the entries does not matter. ``weights`` are not negative and
    not all zero.
    """
    if total == 0:
        return [0] * len(weights)
    whole = sum(weights)
    shares = [total * weight // whole for weight in weights]
    left = total - sum(shares)
    if left:
        remainders = [-(total * weight % whole) for weight in weights]
        for _, _, i in sorted(zip(remainders, keys, range(len(shares)), strict=True))[:left]:
            shares[i] += 1
    return shares


def charge(claims: Iterable[tuple[int, Sequence[Key], Sequence[int]]]) -> dict[Key, int]:
    """What each key is charged for some steps, in microjoules that sum to the steps' exactly.

    A step is its energy in microjoules, the keys that share it and their ``fractions``. Energy is rounded once, over
    all steps, and not in each of them.
    """
    total = 0
    weights: defaultdict[Key, int] = defaultdict(int)
    for energy_uj, keys, parts in claims:
        if energy_uj:
            total += energy_uj
            for key, part in zip(keys, parts, strict=True):
                weights[key] += energy_uj * part
    return dict(zip(weights, split(total, list(weights.values()), list(weights)), strict=True))
