"""`make bench`: Wattle beside its peers, and the page that says how it went."""

import argparse
import platform
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from loadtests.peers import ceilings, http_rounds, report, rounds, weights
from loadtests.peers.environments import python_of
from loadtests.peers.processes import ROOT, cores
from loadtests.peers.records import Records
from loadtests.peers.table import PEERS
from loadtests.peers.workloads import WORKLOADS


def main() -> None:
    """Measure what was not measured yet, and write the page."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _end)
    root: Path = arguments.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    results = root / ("quick.jsonl" if arguments.quick else "results.jsonl")
    if arguments.fresh:
        results.unlink(missing_ok=True)
    records = Records(results)
    if not arguments.report:
        _measure(arguments, root, records)
    page = results.with_suffix(".md") if arguments.quick else arguments.page
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(report.render(records.all, before), encoding="utf-8")
    print(f"written: {page}")


def _measure(arguments: argparse.Namespace, root: Path, records: Records) -> None:
    wanted = arguments.only or [""]
    workloads = [workload for workload in WORKLOADS if any(each in workload.name for each in wanted)]
    if workloads:
        _measure_machine(root, records)
        peers = [PEERS[name] for name in arguments.peers or PEERS]
        least_s = 0.05 if arguments.quick else 0.4
        plan = rounds.Plan(root, peers, workloads, arguments.rounds, least_s, all_settings=not arguments.quick)
        rounds.measure(plan, records)
    if any(each in "http" for each in wanted):
        http_rounds.measure(root, arguments.rounds, records, _machine(), quick=arguments.quick)


def _measure_machine(root: Path, records: Records) -> None:
    digest = weights.digest()
    if records.find("machine") and not records.find("machine", models=digest):
        raise SystemExit("the workloads have changed since the last run: begin again with --fresh")
    if not records.find("machine"):
        print("measuring the machine's ceilings", flush=True)
        rates = ceilings.measure(python_of(root, "wattle"), ROOT)
        records.add("machine", models=digest, rates=rates, cache_bytes=ceilings.cache_bytes(), **_machine())


def _end(number: int, frame: FrameType | None) -> None:
    """Ended like this, the servers end too; a second signal must not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    known = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8") if flag in flags
    ]
    return {
        "processor": name,
        "cores": len(cores()),
        "flags": known,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "date": time.strftime("%Y-%m-%d"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PART", help="workloads with this in their names, or http")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="only these")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (default 5)")
    parser.add_argument(
        "--quick", action="store_true", help="short samples and no settings tried: figures of no worth"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before, and begin again")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--root", type=Path, default=ROOT / ".peers", help="environments, models and results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page to write")
    return parser


if __name__ == "__main__":
    main()
