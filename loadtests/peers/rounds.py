"""Measures the workloads engine against engine: who takes part, at which setting, in which order, how often."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtests.peers import agreement, weights
from loadtests.peers.environments import make, python_of
from loadtests.peers.power import Meter
from loadtests.peers.processes import Team, Watch, WorkerFailed, cores
from loadtests.peers.records import Record, Records
from loadtests.peers.table import REFERENCE, Peer, Setting, Variant, order, settings
from loadtests.peers.worker import Ids, Ran, Run
from loadtests.peers.workloads import Shape, Workload

_MOST_REPEATS = 200
_LARGE = 100_000_000
"""Weights of a model that reads long prompts slowly."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A peer, computing in one way."""

    peer: Peer
    variant: Variant

    @property
    def fields(self) -> dict[str, str]:
        """What its records say of it."""
        return {"peer": self.peer.name, "variant": self.variant.name}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    root: Path
    peers: Sequence[Peer]
    workloads: Sequence[Workload]
    rounds: int
    least_s: float
    """A sample repeats its batch until it lasts about this long."""
    all_settings: bool
    """Whether every setting is tried; else the first."""


def measure(plan: Plan, records: Records) -> None:
    """Measure everything that ``records`` does not hold yet."""
    if not _environment(plan, "huggingface", records):
        raise SystemExit("huggingface makes the models for everybody: without it nothing can be measured")
    able = [peer for peer in plan.peers if peer.name == "wattle" or _environment(plan, peer.name, records)]
    if failure := weights.make_sources(plan.root):
        raise SystemExit(f"the models could not be made: {failure}")
    sentences: Ids = json.loads((plan.root / "models" / "sentences.json").read_text())
    shapes = {workload.shape.name: workload.shape for workload in plan.workloads}
    for shape in shapes.values():
        workloads = [workload for workload in plan.workloads if workload.shape is shape]
        rows = {workload.name: workload.rows(sentences) for workload in workloads}
        _measure_shape(plan, shape, workloads, rows, _contenders(plan, able, shape, records), records)


def _environment(plan: Plan, name: str, records: Records) -> bool:
    if failure := make(plan.root, name):
        records.add("absent", peer=name, variant="", shape="", reason=failure)
        print(f"{name} is left out: {failure}", flush=True)
    return failure is None


def _contenders(plan: Plan, peers: Sequence[Peer], shape: Shape, records: Records) -> list[Contender]:
    found = []
    for peer in peers:
        for variant in peer.variants:
            if shape.kind not in variant.kinds:
                continue
            failure = _too_slow(variant, shape, records) or weights.convert(plan.root, peer, variant, shape)
            if failure:
                _leave_out(Contender(peer, variant), shape, failure, records)
            else:
                found.append(Contender(peer, variant))
    return found


def _too_slow(variant: Variant, shape: Shape, records: Records) -> str | None:
    """Why nobody would compute so on this machine: where bfloat16 is imitated, large products take minutes."""
    rates = records.find("machine")[0]["rates"]
    large = shape.kind == "encode" or shape.target_parameters > _LARGE
    if large and variant.arithmetic == "bf16" and rates["bf16"] < rates["fp32"] / 10:
        return f"bfloat16 products at {rates['bf16'] / 1e9:.1f} GOP/s here, float32 at {rates['fp32'] / 1e9:.0f}"
    return None


def _leave_out(contender: Contender, shape: Shape, reason: str, records: Records) -> None:
    records.add("absent", **contender.fields, shape=shape.name, reason=reason)
    print(f"{contender.peer.title} {contender.variant.name} is left out of {shape.name}: {reason}", flush=True)


def _measure_shape(
    plan: Plan,
    shape: Shape,
    workloads: Sequence[Workload],
    rows: Mapping[str, Ids],
    contenders: Sequence[Contender],
    records: Records,
) -> None:
    references = _references(plan, shape, workloads, rows)
    able = []
    for contender in contenders:
        try:
            _qualify(plan, contender, workloads, rows, references, records)
            able.append(contender)
        except (WorkerFailed, ValueError) as error:
            _leave_out(contender, shape, str(error), records)
    with ExitStack() as stack:
        teams: dict[tuple[Contender, Setting], Team] = {}
        for workload in workloads:
            for number in range(plan.rounds):
                for contender in turn(able, number):
                    best = best_setting(records, contender, workload)
                    fields = {"workload": workload.name, **contender.fields, "round": number}
                    if records.find("sample", **fields):
                        continue
                    if (contender, best) not in teams:
                        team = _team(plan, contender, shape, best)
                        teams[contender, best] = stack.enter_context(team)
                        team.run(Run(rows[workload.name], workload.beams, workload.new_tokens))
                    seconds = _tries(records, contender, workload)[best]
                    repeats = min(max(math.ceil(plan.least_s / seconds), 1), _MOST_REPEATS)
                    run = Run(rows[workload.name], workload.beams, workload.new_tokens, repeats)
                    sample = _sample(teams[contender, best], run)
                    read = sum(map(len, run.rows))
                    records.add("sample", **fields, setting=best.text, input_tokens=read, **sample)
            _tell(workload, able, records)


def turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of round ``number``: everybody once, another one first."""
    if not contenders:
        return []
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


def _references(
    plan: Plan, shape: Shape, workloads: Sequence[Workload], rows: Mapping[str, Ids]
) -> dict[str, list[Any]]:
    """What the reference writes, kept from run to run."""
    peer, variant = REFERENCE
    found: dict[str, list[Any]] = {}
    team: Team | None = None
    try:
        for workload in workloads:
            path = plan.root / "references" / f"{workload.name}.json"
            if not path.exists():
                team = team or _team(plan, Contender(peer, variant), shape, Setting(1, 1, 2048))
                run = Run(rows[workload.name], workload.beams, workload.new_tokens, with_outputs=True)
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(team.run(run).outputs))
            found[workload.name] = json.loads(path.read_text())
    finally:
        if team:
            team.close()
    return found


def _qualify(
    plan: Plan,
    contender: Contender,
    workloads: Sequence[Workload],
    rows: Mapping[str, Ids],
    references: Mapping[str, Sequence[Any]],
    records: Records,
) -> None:
    """Try the contender at each of its settings, and compare what it writes with the reference."""
    shape = workloads[0].shape
    choices = settings(shape.kind, contender.peer, len(cores()))
    for setting in choices if plan.all_settings else choices[:1]:
        new = [
            workload
            for workload in workloads
            if not records.find("try", workload=workload.name, **contender.fields, setting=asdict(setting))
        ]
        if not new:
            continue
        print(f"trying {contender.peer.title} {contender.variant.name}, {setting.text}: {shape.name}", flush=True)
        with _team(plan, contender, shape, setting) as team:
            for workload in new:
                run = Run(rows[workload.name], workload.beams, workload.new_tokens, with_outputs=True)
                ran = team.run(run)
                compare: Callable[[Any, Any], agreement.Agreement] = (
                    agreement.of_vectors if shape.kind == "encode" else agreement.of_texts
                )
                agreed = compare(ran.outputs or [], references[workload.name])
                seconds = ran.ended_s - ran.started_s
                # The first run of a shape plans memory and picks kernels: what is short is timed again.
                if seconds < 2:
                    again = min(max(math.ceil(plan.least_s / seconds / 2), 1), _MOST_REPEATS)
                    ran = team.run(Run(run.rows, run.beams, run.new_tokens, again))
                    seconds = (ran.ended_s - ran.started_s) / again
                fields = {"workload": workload.name, **contender.fields, "setting": asdict(setting)}
                records.add("try", **fields, seconds=seconds, agreement=asdict(agreed), versions=team.versions)


def _tries(records: Records, contender: Contender, workload: Workload) -> dict[Setting, float]:
    found = records.find("try", workload=workload.name, **contender.fields)
    return {Setting(**record["setting"]): record["seconds"] for record in found}


def best_setting(records: Records, contender: Contender, workload: Workload) -> Setting:
    """The fastest of those that were tried."""
    tries = _tries(records, contender, workload)
    return min(tries, key=lambda setting: tries[setting])


def _team(plan: Plan, contender: Contender, shape: Shape, setting: Setting) -> Team:
    peer = contender.peer
    log = plan.root / "logs" / f"{peer.name}.log"
    log.parent.mkdir(exist_ok=True)
    load = order(plan.root, shape, contender.variant, setting, cores())
    python = python_of(plan.root, peer.name)
    return Team(python, f"{peer.name}_worker", load, log, native_replicas=peer.native_replicas)


def _sample(team: Team, run: Run) -> Record:
    """Time ``run``; figures are those of one batch."""
    meter, watch, started_s = Meter(), Watch(), time.monotonic()
    own_s = time.process_time()
    ran: Ran = team.run(run)
    elapsed_s = time.monotonic() - started_s
    energy = meter.energy(ran.cpu_s, ran.ended_s - ran.started_s, len(cores()))
    return {
        "seconds": (ran.ended_s - ran.started_s) / run.repeats,
        "cpu_s": ran.cpu_s / run.repeats,
        "joules": energy.joules / run.repeats,
        "quality": energy.quality,
        "repeats": run.repeats,
        "foreign_cores": watch.foreign_cores(ran.cpu_s + time.process_time() - own_s, elapsed_s),
    }


def _tell(workload: Workload, contenders: Sequence[Contender], records: Records) -> None:
    """A line of progress."""
    medians = []
    for contender in contenders:
        seconds = sorted(
            record["seconds"] for record in records.find("sample", workload=workload.name, **contender.fields)
        )
        if seconds:
            medians.append(f"{contender.peer.name} {contender.variant.name} {seconds[len(seconds) // 2] * 1e3:.1f}")
    print(f"{workload.name}, ms: {', '.join(medians)}", flush=True)
