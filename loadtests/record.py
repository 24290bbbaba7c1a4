"""A run as one JSON document: every request, the figures made of them, and what was found around them."""

import json
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtests.balance import Balance, Scrape, balance
from loadtests.figures import Figures, Window, as_dict, by_task, drift, figures, windows
from loadtests.meter import Metered
from loadtests.plan import Plan
from loadtests.samples import Sample

FORMAT = 1


class BadReport(ValueError):
    """A file that is no report of a load test; the message says why."""


@dataclass(slots=True)
class Observed:
    """What a run has found, before any arithmetic."""

    plan: Plan
    target: str
    started_at: str
    """ISO 8601, UTC."""
    load_s: float
    """How long requests were made."""
    samples: list[Sample]
    models: list[dict[str, Any]] = field(default_factory=list)
    before: Scrape | None = None
    ended: Scrape | None = None
    after: Scrape | None = None
    metered: Metered | None = None
    """By this machine's meter, where the server has none."""
    power: list[tuple[float, float]] = field(default_factory=list)
    """The meter over time: seconds since the run began, watts."""
    died_at_s: float | None = None
    notes: list[str] = field(default_factory=list)


def document(run: Observed) -> dict[str, Any]:
    """Everything that a report shows, and every request for whoever wants to count again."""
    scenario = run.plan.read_scenario()
    warm_up_s = min(scenario.warm_up_s, run.load_s)
    counted = [sample for sample in run.samples if sample.at_s >= warm_up_s]
    ended_s = max([run.load_s, *(sample.at_s + sample.latency_ms / 1000 for sample in counted)])
    # What an overloaded server answers after the last arrival it has not done within the time of the arrivals.
    duration_s = max(ended_s - warm_up_s, 1e-9)
    total = figures(counted, duration_s)
    held: Balance | None = None
    if run.before and run.ended and run.after:
        held = balance(run.before, run.ended, run.after, run.samples)
    notes = [*run.plan.notes, *run.notes, *_complaints(run, total, held)]
    return {
        "format": FORMAT,
        "name": run.plan.name,
        "started_at": run.started_at,
        "target": run.target,
        "dialect": run.plan.dialect,
        "model": run.plan.model,
        "scenario": scenario.model_dump(mode="json"),
        "seed": run.plan.seed,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(terse=True),
            "processor": _processor(),
        },
        "models": run.models,
        "load_s": run.load_s,
        "counted_s": duration_s,
        "died_at_s": run.died_at_s,
        "notes": notes,
        "total": as_dict(total),
        "tasks": {name: as_dict(each) for name, each in by_task(counted, duration_s).items()},
        "windows": [as_dict(window) for window in windows(run.samples, 0.0, max(run.load_s, 1e-9))],
        "drift": {
            "latency": drift(run.samples, warm_up_s, run.load_s, lambda sample: sample.latency_ms),
            "allocated_j": drift(
                run.samples,
                warm_up_s,
                run.load_s,
                lambda sample: None if sample.allocated_j is None else sample.allocated_j / sample.texts,
            ),
        },
        "balance": None if held is None else {**asdict(held), "holds": held.holds},
        "metered": _per_query(run.metered, run.samples),
        "power": run.power,
        "failures": dict(Counter(sample.error for sample in run.samples if sample.error).most_common(20)),
        "requests": [sample.as_dict() for sample in run.samples],
    }


def read_document(path: Path) -> dict[str, Any]:
    """A report by its JSON file, or by the folder that holds it. Raises ``BadReport``."""
    path = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadReport(f"{path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BadReport(f"{path} is no report of `wattle loadtest` in format {FORMAT}")
    return found


def samples_of(found: dict[str, Any]) -> list[Sample]:
    """The counted requests of a report: those after the warm-up."""
    samples = (Sample(**request) for request in found["requests"])
    return [sample for sample in samples if sample.at_s >= found["scenario"]["warm_up_s"]]


def windows_of(found: dict[str, Any]) -> list[Window]:
    """The pieces of a report's run."""
    return [Window(**window) for window in found["windows"]]


def figures_of(fields: dict[str, Any]) -> dict[str, Any]:
    """A report's figures, flat: ``latency_ms.p95`` and the like; None where there is no such figure."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            flat[name] = value
    return flat


def _complaints(run: Observed, total: Figures, held: Balance | None) -> Sequence[str]:
    """What a reader must be told before the figures."""
    said = []
    if run.died_at_s is not None:
        said.append(f"The target stopped answering {run.died_at_s:.1f} s into the run; the figures end there.")
    if not total.queries:
        said.append("No request was answered.")
    if total.failed:
        said.append(f"{total.failed} of {total.requests} requests failed.")
    if total.without_bill and total.queries:
        share = "No answer" if total.without_bill == total.requests - total.failed else f"{total.without_bill} answers"
        said.append(f"{share} came with a bill: their joules are unknown, not zero.")
    if total.unsettled:
        said.append(f"{total.unsettled} bills were not final when the run was closed.")
    if held is None and run.metered is None and total.queries:
        said.append("There was no meter, neither the server's nor this machine's: nothing is said of energy in total.")
    if held is not None and not held.holds:
        said.append(
            f"Bills, idle and named rest leave {held.residual_j:.2f} J of the meter's {held.meter_j:.2f} J "
            "unaccounted for: the server answered others too, or its bills are not complete."
        )
    return said


def _per_query(found: Metered | None, samples: Sequence[Sample]) -> dict[str, Any] | None:
    """What this machine's meter says of the whole run, warm-up included; None where nothing was metered."""
    if found is None:
        return None
    answered = [sample for sample in samples if sample.error is None]
    queries = sum(sample.texts for sample in answered)
    tokens = sum(sample.output_tokens or 0 for sample in answered)
    return {
        **asdict(found),
        "allocated_j": found.allocated_j,
        "active_j_per_query": found.active_j / queries if queries else None,
        "allocated_j_per_query": found.allocated_j / queries if queries else None,
        "active_j_per_output_token": found.active_j / tokens if tokens else None,
        "allocated_j_per_output_token": found.allocated_j / tokens if tokens else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
