"""How the energy of a step is shared among its requests: pure integer functions. Knows nothing of meters.

A step of n requests costs ``F + m * sum(work)``, and F again for each further forward pass. Request i is charged
``F/n + m * work_i``, which is the Shapley value of that affine cost, rescaled so that the charges sum to the energy
that the meter saw.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from energy.types import Phase, Step, Work

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The affine cost of a step; only its proportions matter, for charges are rescaled to the measured energy.

    ``wattle calibrate`` measures them for a model and a machine.
    """

    fixed: int = 4096
    """F: what a forward pass costs however small it is. By default four tokens' worth: step times of decoders from 25
    to 135 million parameters on two cores, at batch 1, 4, 8 and 32, fit between one and twelve."""
    prefill_token: int = 1024
    """m for one token of a text that is read."""
    decode_token: int = 1024
    """m for one token of a text that is written."""
    context_token: int = 8
    """m for one token already in the buffers, which attention reads again: between a 125th and a 210th of a token
    written in the starters that write."""


DEFAULTS = Coefficients()


def weigh(work: Sequence[Work], coefficients: Coefficients, passes: int = 1) -> list[int]:
    """One integer weight per entry, in proportion to ``F * passes/n + m * work_i``."""
    n, decode = len(work), Phase.DECODE
    fixed, context = passes * coefficients.fixed, n * coefficients.context_token
    written, read = n * coefficients.decode_token, n * coefficients.prefill_token
    return [
        fixed + (written if phase is decode else read) * tokens + context * context_tokens
        for _, phase, tokens, context_tokens in work
    ]


def share_load(step: Step, coefficients: Coefficients) -> list[int]:
    """What falls to each entry of a step's work of its load, rounded down to nanoseconds."""
    work, load_ns = step.work, step.load_ns
    if len(work) <= 1:
        return [load_ns] * len(work)
    weights = weigh(work, coefficients, step.passes)
    whole = sum(weights)
    return [load_ns * weight // whole for weight in weights] if whole else [load_ns // len(work)] * len(work)


def charge(energy_uj: int, shares: Mapping[Key, int]) -> dict[Key, int]:
    """What each key is charged for its share of some energy, in microjoules that sum to it exactly."""
    return dict(zip(shares, split(energy_uj, list(shares.values()), list(shares)), strict=True)) if energy_uj else {}


def split(total: int, weights: Sequence[int], keys: Sequence[Any]) -> list[int]:
    """Share ``total`` in proportion to ``weights``, in whole units that sum to it exactly (largest remainder).

    Ties go to the smaller key, so that the order of the entries does not matter. ``weights`` are not negative; where
    all are zero, all are alike.
    """
    if total == 0:
        return [0] * len(weights)
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    shares = [total * weight // whole for weight in weights]
    left = total - sum(shares)
    if left:
        remainders = [total * weight % whole for weight in weights]
        least = sorted(remainders)[-left]
        shares = [
            share + 1 if remainder >= least else share for share, remainder in zip(shares, remainders, strict=True)
        ]
        too_many = sum(shares) - total
        if too_many:
            tied = [i for i, remainder in enumerate(remainders) if remainder == least]
            tied.sort(key=keys.__getitem__)
            for i in tied[-too_many:]:
                shares[i] -= 1
    return shares
