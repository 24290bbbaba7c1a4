"""What a step of a model costs on a machine, fitted to steps that ran. Knows nothing of how they come to run.

    load = F + a * (tokens read) + b * (tokens written) + c * (context tokens), with the padding that is computed

Load is CPU time on a processor: a step's energy is known only over windows that hold many, and within a model it goes
with the load. On a GPU a step's duration holds much that the GPU does not do; there lots of like steps are metered,
each over many windows, and the load is what they take above idle. All four are at least zero, and errors count in
proportion to the load, so that small steps matter as much as large ones.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from energy.attribution import DEFAULTS, Coefficients
from energy.types import Phase, Step

FORMAT_VERSION = 1
LEAST_STEPS = 30
LEAST_LOTS = 6
_PS_PER_NS = 1000


class CalibrationError(Exception):
    """Says why there is no calibration."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Nanoseconds of load, and how well they foretell steps that were held out of the fit.

    Of a GPU they are the durations that go with the energy: all steps together last as long as they did.
    """

    fixed_ns: float
    """Of a forward pass."""
    prefill_token_ns: float
    decode_token_ns: float
    context_token_ns: float
    r2: float
    """Share of the variance of the held-out steps' loads that is explained."""
    held_out_error: float
    """Median error of a held-out step's load, over its load."""
    default_error: float
    """The same of the default coefficients at their best scale."""
    steps: int

    @property
    def coefficients(self) -> Coefficients:
        """In picoseconds, for charges are shared in whole numbers."""
        read, written = self.prefill_token_ns, self.decode_token_ns
        return Coefficients(
            fixed=max(1, round(self.fixed_ns * _PS_PER_NS)),
            # A phase that never ran is taken to cost what the other does.
            prefill_token=round((read or written) * _PS_PER_NS),
            decode_token=round((written or read) * _PS_PER_NS),
            context_token=round(self.context_token_ns * _PS_PER_NS),
        )


@dataclass(frozen=True, slots=True)
class Lot:
    """Steps that are alike, and what a meter says that they took together above idle."""

    steps: Sequence[Step]
    active_uj: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A fit, and what it was made of."""

    model: str
    revision: str
    machine: str
    fit: Fit


def fit_steps(steps: Sequence[Step]) -> Fit:
    """Fit two thirds of ``steps`` and judge by the others; raises ``CalibrationError`` where they are too few."""
    steps = [step for step in steps if step.work and step.load_ns > 0]
    if len(steps) < LEAST_STEPS:
        raise CalibrationError(f"{len(steps)} steps ran; at least {LEAST_STEPS} are needed")
    features = np.array([_features(step) for step in steps], float)
    loads = np.array([step.load_ns for step in steps], float)
    held_out = np.arange(len(steps)) % 3 == 2
    solution = _non_negative(features[~held_out] / loads[~held_out, None])
    return _judge(solution, features[held_out], loads[held_out], features[held_out] @ solution, len(steps))


def fit_lots(lots: Sequence[Lot]) -> Fit:
    """Fit what passes take on average in each of ``lots``, and judge by each of them with the fit of all others.

    Raises ``CalibrationError`` where there are too few, or the meter saw nothing above idle.
    """
    lots = [lot for lot in lots if lot.steps]
    if len(lots) < LEAST_LOTS:
        raise CalibrationError(f"{len(lots)} kinds of batches ran; at least {LEAST_LOTS} are needed")
    if any(lot.active_uj <= 0 for lot in lots):
        raise CalibrationError(
            "the meter saw no more than at rest; something else ran before, or the model is too small"
        )
    sums = np.array([np.sum([_features(step) for step in lot.steps], axis=0) for lot in lots], float)
    features = sums / sums[:, :1]
    active_uj = np.array([lot.active_uj for lot in lots])
    lasted_ns = sum(step.load_ns for lot in lots for step in lot.steps)
    loads = active_uj / sums[:, 0] * (lasted_ns / active_uj.sum())
    others = ~np.eye(len(lots), dtype=bool)
    guessed = np.array(
        [row @ _non_negative(features[kept] / loads[kept, None]) for row, kept in zip(features, others, strict=True)]
    )
    solution = _non_negative(features / loads[:, None])
    return _judge(solution, features, loads, guessed, sum(len(lot.steps) for lot in lots))


def _judge(
    solution: NDArray[np.float64],
    features: NDArray[np.float64],
    loads: NDArray[np.float64],
    guessed: NDArray[np.float64],
    steps: int,
) -> Fit:
    """A ``solution``, and how far what it ``guessed`` of ``loads`` that it had not seen is off."""
    default = features @ np.array(
        [DEFAULTS.fixed, DEFAULTS.prefill_token, DEFAULTS.decode_token, DEFAULTS.context_token], float
    )
    default *= np.median(loads / default)
    variance = float(((loads - loads.mean()) ** 2).sum())
    unexplained = float(((loads - guessed) ** 2).sum())
    fixed, read, written, context = map(float, solution)
    return Fit(
        fixed_ns=fixed,
        prefill_token_ns=read,
        decode_token_ns=written,
        context_token_ns=context,
        r2=1 - unexplained / variance if variance else 0.0,
        held_out_error=float(np.median(np.abs(guessed / loads - 1))),
        default_error=float(np.median(np.abs(default / loads - 1))),
        steps=steps,
    )


def write_calibration(calibration: Calibration, beside: Path, elsewhere: Path) -> Path:
    """Write it ``beside`` the model, or ``elsewhere`` where that cannot be written; returns which.

    Raises ``OSError`` where neither can be.
    """
    try:
        written = _write(calibration, beside)
    except OSError:
        return _write(calibration, elsewhere)
    elsewhere.unlink(missing_ok=True)
    return written


def read_calibration(model: str, revision: str, beside: Path, elsewhere: Path) -> Calibration | None:
    """The calibration of a model, None where there is none; raises ``CalibrationError`` for one that cannot be used.

    ``elsewhere`` goes first: it is there only where this machine could not write ``beside`` the model.
    """
    path = elsewhere if elsewhere.exists() else beside
    try:
        document = json.loads(path.read_bytes())
        version = document.pop("format_version")
        if version != FORMAT_VERSION:
            raise CalibrationError(f"{path} has format_version {version!r}; this version reads {FORMAT_VERSION}")
        found = Calibration(**{**document, "fit": Fit(**document["fit"])})
        if min(asdict(found.fit)[name] for name in ("fixed_ns", "prefill_token_ns", "decode_token_ns")) < 0:
            raise CalibrationError(f"{path} holds a negative cost")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}); run `wattle calibrate` again") from error
    if (found.model, found.revision) != (model, revision):
        raise CalibrationError(
            f"{path} is of {found.model}, revision {found.revision}, and the model is {model}, revision {revision}; "
            "run `wattle calibrate` again"
        )
    return found


def _features(step: Step) -> tuple[int, int, int, int]:
    """Passes, tokens read, tokens written and context tokens: what the four terms of a load count."""
    writes = step.work is not None and step.work.phase is Phase.DECODE
    tokens = step.tokens_with_padding
    read, written = (0, tokens) if writes else (tokens, 0)
    return step.passes, read, written, step.context_tokens


def _non_negative(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-negative least squares solution of ``features @ x = 1``: the best of those over each set of columns.

    Rows divided by what they are to give make errors count in proportion to it.
    """
    used = [column for column in range(features.shape[1]) if features[:, column].any()]
    best, least = np.zeros(features.shape[1]), np.inf
    for count in range(1, len(used) + 1):
        for columns in map(list, combinations(used, count)):
            solution = np.linalg.lstsq(features[:, columns], np.ones(len(features)), rcond=None)[0]
            error = float(((features[:, columns] @ solution - 1) ** 2).sum())
            if error < least and (solution >= 0).all():
                least, best = error, np.zeros(features.shape[1])
                best[columns] = solution
    return best


def _write(calibration: Calibration, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(calibration)}, indent=1) + "\n")
    os.replace(partial, path)
    return path
