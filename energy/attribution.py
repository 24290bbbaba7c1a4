"""How the energy of a step is shared among its requests: pure integer functions. Knows nothing of meters.

A step of n requests costs ``F + m * sum(work)``. Request i is charged ``F/n + m * work_i``, which is the Shapley
value of that affine cost, rescaled so that the charges sum to the energy that the meter saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from energy.types import Work


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The affine cost of a step; only its proportions matter, for charges are rescaled to the measured energy."""

    fixed: int = 4096
    """F: what a step costs however small it is. By default four tokens' worth: step times of decoders from 25 to
    135 million parameters on two cores, at batch 1, 4, 8 and 32, fit between one and twelve."""
    token: int = 1024
    """m for one real token."""
    context_token: int = 1
    """m for one token already in the buffers, which attention reads again: about 1/(6 d) of a token's arithmetic
    at model width d, more in memory traffic; a thousandth lies in between for the widths that fit a CPU."""


DEFAULTS = Coefficients()


def weigh(work: Sequence[Work], coefficients: Coefficients) -> list[int]:
    """One integer weight per entry, in proportion to ``F/n + m * work_i``."""
    n = len(work)
    return [
        coefficients.fixed + n * (coefficients.token * item.tokens + coefficients.context_token * item.context_tokens)
        for item in work
    ]


def split(total: int, weights: Sequence[int], keys: Sequence[str]) -> list[int]:
    """Share ``total`` in proportion to ``weights``, in whole units that sum to it exactly (largest remainder).

    Ties go to the smaller key, so that the order of the entries does not matter. ``weights`` are not negative and
    not all zero.
    """
    if total == 0:
        return [0] * len(weights)
    whole = sum(weights)
    shares = []
    remainders = []
    for weight in weights:
        share, remainder = divmod(total * weight, whole)
        shares.append(share)
        remainders.append(-remainder)
    left = total - sum(shares)
    for _, _, i in sorted(zip(remainders, keys, range(len(shares)), strict=True))[:left]:
        shares[i] += 1
    return shares


def charge(energy_uj: int, work: Sequence[Work], coefficients: Coefficients = DEFAULTS) -> list[int]:
    """What each entry of ``work`` is charged of a step's energy, in microjoules that sum to it exactly."""
    return split(energy_uj, weigh(work, coefficients), [item.request_id for item in work])
