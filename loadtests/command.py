"""`wattle loadtest`: run, compare, sweep. Makes a plan, runs Locust in a process of its own and reads its report."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from loadtests import compare, sweep
from loadtests.dialects import DIALECTS
from loadtests.local import CannotServe, serve
from loadtests.plan import Plan
from loadtests.record import BadReport, read_document
from loadtests.report import aligned, as_text
from loadtests.scenario import BadScenario, Scenario, read_scenario, read_tasks
from loadtests.target import BadTarget

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
FAILED, WRONG = 1, 2
DRAIN_S = 30
"""How long requests that are under way at the end may go on."""
MISTAKES = (BadScenario, BadTarget, BadReport, sweep.BadSetting, compare.NotComparable)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0; 1 where the run, or the comparison, is not good enough; 2 where it was asked wrongly."""
    parsers = {"run": _run_parser(), "compare": _compare_parser(), "sweep": _sweep_parser()}
    kind = arguments[0] if arguments and arguments[0] in parsers else "run"
    options = parsers[kind].parse_args(arguments[1:] if arguments[:1] == [kind] else arguments)
    commands = {"run": _run, "compare": _compare, "sweep": _sweep}
    # The server and Locust are stopped in `finally`, which a plain SIGTERM would skip.
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return commands[kind](options)
    except MISTAKES as error:
        return _fail(str(error), WRONG)
    except CannotServe as error:
        return _fail(str(error), FAILED)
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, slots=True)
class Asked:
    """What all runs of one call have in common."""

    scenario: Scenario
    name: str
    options: argparse.Namespace

    def run(self, settings: Mapping[str, str], out: Path, headless: bool) -> dict[str, Any]:
        """One run, on a server with these settings where no target was given; returns its report."""
        options = self.options
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            address = options.target or stack.enter_context(serve(settings, out))
            plan = Plan(
                name=self.name,
                scenario=self.scenario.model_dump(mode="json"),
                target=address,
                dialect=options.dialect,
                out=str(out.resolve()),
                model=options.model,
                path=options.path,
                allow_remote=options.allow_remote,
                api_key_env=options.api_key_env,
                seed=options.seed,
                timeout_s=options.timeout_s,
                settle_s=options.settle_s,
            )
            target = plan.open_target()
            if not target.is_alive():
                raise BadTarget(f"nothing answers at {address}; is the server up?")
            if self.scenario.stream_share and options.dialect == "wattle" and not target.streams():
                note = "The server's native routes do not stream: streams were asked for in one piece."
                plan = plan.without_streams(note)
            return _run_locust(plan, out, None if headless else options.web_port)


def _run(options: argparse.Namespace) -> int:
    settings = {name: values[0] for name, values in sweep.read_settings(options.set).items()}
    found = _asked(options).run(settings, options.out, options.headless)
    print(as_text(found, colour=sys.stdout.isatty()))
    print(f"\nThe whole report: {options.out / 'report.html'}")
    total = found["total"]
    if found["died_at_s"] is not None or not total["queries"]:
        return FAILED
    return FAILED if total["failed"] > options.max_failures * total["requests"] else 0


def _compare(options: argparse.Namespace) -> int:
    a, b = read_document(options.a), read_document(options.b)
    ratios = compare.compare(a, b)
    print("\n".join(aligned(compare.rows(ratios, options.max_regression))))
    worse = [ratio for ratio in ratios if ratio.regressed(options.max_regression)]
    if not worse:
        print(f"\nNothing is worse by more than {100 * options.max_regression:g}%.")
        return 0
    for ratio in worse:
        print(f"wattle: {ratio.task}: {ratio.metric} {ratio.says}", file=sys.stderr)
    return FAILED


def _sweep(options: argparse.Namespace) -> int:
    asked = _asked(options)
    points: list[sweep.Point] = []
    combinations = sweep.grid(sweep.read_settings(options.set))
    for number, settings in enumerate(combinations, 1):
        out = options.out / f"{number:02}"
        name = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"{number} of {len(combinations)}: {name}", file=sys.stderr)
        try:
            points.append(sweep.read_point(settings, asked.run(settings, out, headless=True), out.name))
        except CannotServe as error:
            points.append(sweep.failed_point(settings, str(error)))
        # After every run: an interrupted sweep keeps what it has found.
        _write_sweep(asked, points)
    shown = sweep.table(points, options.max_p95_ms)
    print("\n".join(aligned([shown.head, *shown.rows])))
    for line in shown.below:
        print(line.text)
    print(f"\nThe whole report: {options.out / 'sweep.html'}")
    return FAILED if any(line.bad for line in shown.below) else 0


def _write_sweep(asked: Asked, points: Sequence[sweep.Point]) -> None:
    options = asked.options
    title = f"Sweep of {asked.name} over {', '.join(sweep.read_settings(options.set))}"
    subtitle = f"{asked.scenario.duration_s:g} s each, {asked.scenario.model_dump(exclude_defaults=True)}"
    page = sweep.as_html(title, subtitle, points, options.max_p95_ms)
    (options.out / "sweep.html").write_text(page, encoding="utf-8")
    made = json.dumps(sweep.as_document(points, options.max_p95_ms), indent=1)
    (options.out / "sweep.json").write_text(made, encoding="utf-8")


def _asked(options: argparse.Namespace) -> Asked:
    scenario = read_scenario(
        options.scenario,
        users=options.users,
        rate=options.rate,
        duration_s=options.duration,
        tasks=read_tasks(options.tasks) if options.tasks else None,
    )
    if options.target and options.set:
        raise sweep.BadSetting("--set is for the server that this command starts: leave out --target")
    if options.api_key_env and options.api_key_env not in os.environ:
        raise BadTarget(f"--api-key-env: there is no environment variable {options.api_key_env}")
    return Asked(scenario, Path(options.scenario).stem, options)


def _run_locust(plan: Plan, out: Path, web_port: int | None) -> dict[str, Any]:
    """Run Locust, which writes the report; raises ``BadReport`` with its last words where it wrote none."""
    (out / "report.json").unlink(missing_ok=True)
    plan.write(out / "plan.json")
    log = out / "locust.log"
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--plan", str(out / "plan.json")]
    command += ["--host", plan.target, "--stop-timeout", str(DRAIN_S), "--loglevel", "WARNING"]
    command += ["--logfile", str(log), "--only-summary", "--json-file", str(out / "locust")]
    if web_port is None:
        command += ["--headless"]
    else:
        command += ["--web-host", "127.0.0.1", "--web-port", str(web_port)]
        print(f"Locust waits on http://127.0.0.1:{web_port}; end it with Ctrl-C.", file=sys.stderr)
    log.unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=LOCUSTFILE.parent.parent, stdin=subprocess.DEVNULL)
    try:
        _wait(process)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if (out / "report.json").exists():
        return read_document(out / "report.json")
    said = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    raise CannotServe(f"there is no report: {said[-1] if said else 'no run was started'}; {log} has more")


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Until Locust has ended. An interrupt reaches it too: it closes the account, which must not be cut short."""
    interrupted_s: float | None = None
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            if interrupted_s is not None and time.monotonic() - interrupted_s > 1:
                raise
            interrupted_s = interrupted_s or time.monotonic()
            print("\nclosing the account; once more to give it up", file=sys.stderr)


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "wattle loadtest",
        description="Load a server, and report joules beside milliseconds. `wattle loadtest compare` and `wattle "
        "loadtest sweep` have a --help of their own.",
        allow_abbrev=False,
    )
    _add_common(parser)
    parser.add_argument("--headless", action="store_true", help="no web interface: run at once and print the report")
    parser.add_argument("--web-port", type=int, default=8089, help="port of Locust's web interface [8089]")
    parser.add_argument("--max-failures", type=_share, default=0.0, help="share of failed requests to put up with [0]")
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "wattle loadtest compare",
        description="Ratios of two runs of the same scenario, B over A, with bootstrap confidence intervals. Ends "
        "with status 1 where latency or joules got worse.",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", type=Path, help="report.json of the run to compare with, or its folder")
    parser.add_argument("b", metavar="B", type=Path, help="report.json of the run to judge, or its folder")
    parser.add_argument("--max-regression", type=_positive_share, default=0.1, help="how much worse is allowed [0.1]")
    return parser


def _sweep_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "wattle loadtest sweep",
        description="Run a scenario once for every combination of settings of `wattle serve`, and name the one with "
        "the fewest joules.",
        allow_abbrev=False,
    )
    _add_common(parser)
    parser.add_argument("--max-p95-ms", type=float, help="latency that the chosen setting has to keep")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", default="mixed", help="shipped scenario or path of a .toml file [mixed]")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--users", type=int, help="closed loop: most users at once")
    load.add_argument("--rate", type=float, help="open loop: highest mean number of requests per second")
    parser.add_argument("--duration", type=_seconds, help="how long, such as 30s, 5m or 1h")
    parser.add_argument("--tasks", help="tasks and their weights, such as translate=3,sentiment=1")
    parser.add_argument("--target", help="address of the server; without it one is started on the starters")
    parser.add_argument("--dialect", choices=DIALECTS, default="wattle", help="how the server is asked [wattle]")
    parser.add_argument("--model", help="name of the model to ask for; the server's default otherwise")
    parser.add_argument("--path", help="where requests go instead of the dialect's own path, such as /predict")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the server that is started, such as threads=2; a sweep takes several: threads=1,2",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/loadtest"), help="folder of the report [runs/loadtest]")
    parser.add_argument("--seed", type=int, default=0, help="the same seed asks for the same texts [0]")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="when a request counts as failed [120]")
    parser.add_argument("--settle-s", type=float, default=20.0, help="how long to wait for final bills [20]")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the server's API key")
    parser.add_argument("--allow-remote", action="store_true", help="allow a target that is not this machine")


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        return float(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write, for example, 30s, 5m or 1h") from None


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def _positive_share(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return value


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(message: str, status: int) -> int:
    print(f"wattle: {message}", file=sys.stderr)
    return status
