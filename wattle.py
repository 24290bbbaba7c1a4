"""The command line. Imports the part that a command needs when it runs: serving needs no training, nor torch."""

import argparse
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 where it failed, 2 where it was asked wrongly."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["loadtest"]:
        return loadtest(arguments[1:])
    options = vars(_parser(arguments).parse_args(arguments))
    command = COMMANDS[options.pop("command")]
    try:
        return command.run({name: value for name, value in options.items() if value is not None})
    except KeyboardInterrupt:
        return 130


def serve(flags: dict[str, str]) -> int:
    """Serve the models over HTTP until SIGTERM or SIGINT."""
    # Next to nothing that start-up makes is garbage, and looking for it would take a tenth of the time to ready.
    gc.disable()
    try:
        return _serve(flags)
    finally:
        gc.enable()


def _serve(flags: dict[str, str]) -> int:
    from service.engine.devices import DeviceUnavailable
    from service.keys import KeysFileError
    from service.server import CannotListen
    from service.server import serve as run
    from service.settings import read_settings

    try:
        return run(read_settings(**flags))
    except (CannotListen, KeysFileError, DeviceUnavailable) as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)


def make_key(flags: dict[str, Any]) -> int:
    """Make an API key, add its hash to the file of keys, and print the key, once."""
    from service.keys import KeysFileError, add_key
    from service.settings import read_settings

    name, file = flags.pop(SUBJECT), flags.pop("api_keys_file", None)
    try:
        path = read_settings(**({} if file is None else {"api_keys_file": file})).api_keys_file
        if path is None:
            return _fail("say which file keeps the keys: --api-keys-file FILE, or WATTLE_API_KEYS_FILE", 2)
        print(add_key(path, name, flags))
    except KeysFileError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    print(f"This is the key of {name}. It is shown this once: {path} keeps only its hash.", file=sys.stderr)
    return 0


def models(flags: dict[str, str]) -> int:
    """List the models that `wattle serve` would serve."""
    from service.app import check_manifest
    from service.models import load_models
    from service.settings import read_settings

    try:
        found = load_models(read_settings(**flags).models, check_manifest)
    except ValueError as error:
        return _fail(str(error), 2)
    rows = [("name", "task", "MB", "quantisation", "scores")]
    for model in found.served.values():
        manifest, stored = model.manifest, model.manifest.quantisation
        rows.append(
            (
                manifest.name,
                ", ".join(manifest.tasks) or "-",
                f"{manifest.size_bytes / 1e6:.1f}",
                "none" if stored.scheme == "none" else f"{stored.bits} bits",
                "; ".join(f"{score.metric} {score.value:g} ({score.data})" for score in manifest.scores) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for refusal in found.refused:
        print(f"refused {refusal.folder_name}: {refusal.reason}", file=sys.stderr)
    return 1 if found.refused else 0


def calibrate(flags: dict[str, str]) -> int:
    """Measure what a step of each model costs here, which makes shares of a batch's energy fairer."""
    from energy.calibration import CalibrationError
    from service.calibrate import calibrate as run
    from service.engine.devices import DeviceUnavailable
    from service.settings import read_settings

    try:
        for line in run(read_settings(**flags)):
            print(line, flush=True)
    except (CalibrationError, DeviceUnavailable, OSError) as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    return 0


def meters(flags: dict[str, str]) -> int:
    """Print which meters this machine has, how finely they count, and what is missing and why."""
    from energy.survey import outside, stream, survey
    from service.app import meter_settings
    from service.settings import read_settings

    as_json, streams = flags.pop("json", None), flags.pop("stream", None)
    pid: Any = flags.pop("pid", None)
    try:
        settings = read_settings(**flags)
        wanted = meter_settings(settings, None)
        if pid is not None and not streams:
            raise ValueError("--pid goes with --stream")
        if streams:
            meter = outside(wanted, pid).meter
            for line in stream(meter, settings.sample_interval_ms / 1000):
                print(line, flush=True)
            return _fail(f"the stream has ended: {meter.name}, or the process that was watched is gone", 1)
        found = survey(wanted)
    except BrokenPipeError:
        # Whoever read has enough; nor is there anything to flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ProcessLookupError as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    print(found.as_json() if as_json else found.as_text())
    return 0 if found.devices else 1


def train(flags: dict[str, str]) -> int:
    """Carry out a recipe and export its model; what was interrupted goes on where it stopped."""
    from training.commands import run_training

    return _stage(run_training, flags)


def distil_data(flags: dict[str, str]) -> int:
    """Have the teachers that a recipe names write the targets of its data; what was interrupted goes on."""
    from training.commands import run_distil_data

    return _stage(lambda recipe, settings: run_distil_data(recipe, _asking, settings), flags)


def plan(flags: dict[str, str]) -> int:
    """Propose a model and a training within budgets of size, time and joules, measured here for some seconds."""
    from training.commands import run_plan

    recipe = flags.pop("recipe", None)
    path = None if recipe is None else Path(recipe)
    return _stage(lambda _, settings: run_plan(path, settings), {SUBJECT: "", **flags})


def few_shot(flags: dict[str, str]) -> int:
    """Compare ways to learn from a few labelled examples: heads, fine-tuning, and trunks trained to adapt."""
    from training.commands import run_few_shot

    return _stage(run_few_shot, flags)


def export(flags: dict[str, str]) -> int:
    """Export the model of a finished run once more."""
    from training.commands import run_export

    return _stage(run_export, flags)


def import_(flags: dict[str, str]) -> int:
    """Turn a model of the transformers library, or stored otherwise, into one that `wattle serve` serves."""
    from training.commands import run_import

    return _stage(run_import, flags)


def confidence(flags: dict[str, str]) -> int:
    """Fit how far an exported model's answers from a knowledge base can be trusted, through the service."""
    from training.commands import run_confidence

    return _stage(lambda folder, settings: run_confidence(Path(folder), _asking, settings), flags)


def evaluate(flags: dict[str, str]) -> int:
    """Score exported models through the service, on the data sets that their recipes name."""
    from training.commands import run_evaluation

    def score(folder: str, settings: Any) -> None:
        with _asking(Path(folder)) as ask:
            run_evaluation(Path(folder), ask, settings)

    return _stage(score, flags)


def quantise(flags: dict[str, str]) -> int:
    """Measure exported models stored in every way there is: size, scores and joules through the service."""
    from training.commands import run_quantising

    return _stage(lambda folders, settings: run_quantising(list(map(Path, folders)), _asking, settings), flags)


def frontier(flags: dict[str, str]) -> int:
    """Draw quality against joules per query, from what `wattle quantise --write` has measured."""
    from training.commands import run_frontier

    page = Path(flags.pop("out", "docs/frontier.md"))
    return _stage(lambda folders, _: run_frontier(list(map(Path, folders)), page), flags)


def training_report(flags: dict[str, str]) -> int:
    """Write a page with plots on what runs cost and what came of it: loss over joules, lineage, break-even."""
    from training.commands import run_report

    page = Path(flags.pop("html", "training-report.html"))
    return _stage(lambda names, settings: run_report(names, page, settings), flags)


def search_speed(flags: dict[str, str]) -> int:
    """Time searches in a large knowledge base, through the service."""
    from training.commands import run_search_speed

    def measure(folder: str, settings: Any) -> None:
        with _asking(Path(folder)) as ask:
            run_search_speed(Path(folder), ask, settings)

    return _stage(measure, flags)


@contextmanager
def _asking(folder: Path) -> Iterator[Callable[[str, Any], dict[str, Any]]]:
    """Serve the model in ``folder``; what is given sends a request to a path: documents are put, the rest is posted.

    Scores and costs are the users': the whole application answers, only the socket is left out. Waiting has no limit
    here, nor has what waits, nobody needs a key, and the bills are no user's, so their ledger is forgotten, and so are
    the knowledge bases.
    """
    from starlette.testclient import TestClient

    from service.app import create_app
    from service.settings import read_settings
    from training.errors import TrainingError

    with TemporaryDirectory() as scratch:
        limits = dict.fromkeys(("max_concurrent_requests", "max_queue_tokens", "max_body_bytes"), "1000000000")
        limits["request_timeout_s"] = "3600"
        settings = read_settings(models=str(folder), state=scratch, **limits)
        with TestClient(create_app(settings.model_copy(update={"api_keys_file": None}))) as client:

            def ask(path: str, body: Any) -> dict[str, Any]:
                method = "PUT" if path.endswith("/documents") else "POST"
                answer = client.request(method, f"/v1/{path}", json=body)
                # Of documents, a line tells each step, and the last how it ended.
                document: dict[str, Any] = json.loads(answer.text.splitlines()[-1])
                if answer.status_code != 200 or "error" in document:
                    raise TrainingError(f"the service answered {answer.status_code}: {document['error']}")
                return document

            yield ask


def energy(flags: dict[str, str]) -> int:
    """Say what the requests of a time cost, from the service's ledger."""
    from energy.commands import ReportFailed, run_report
    from energy.settings import read_settings
    from service.settings import read_settings as read_service_settings

    if flags.pop(SUBJECT) != "report":
        return _fail("there is one such command: wattle energy report", 2)
    try:
        settings = read_settings(**flags)
        run_report(settings, settings.ledger or read_service_settings().ledger)
    except ReportFailed as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    return 0


def loadtest(arguments: Sequence[str]) -> int:
    """Load a server and report joules beside milliseconds; compare two runs; sweep over settings."""
    try:
        # It has commands and flags of its own, for no part's settings are its.
        from loadtests.command import main as run
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is missing: load tests need pip install -e '.[cpu,loadtest]'", 1)
    return run(arguments)


def _stage(run: Callable[[Any, Any], object], flags: dict[str, str]) -> int:
    """Run a stage of training; an error that the user can mend is one line on stderr."""
    from training.errors import TrainingError
    from training.settings import read_settings

    subject = flags.pop(SUBJECT)
    try:
        run(subject, read_settings(**flags))  # its Settings, whose type only that part knows
    except TrainingError as error:
        return _fail(str(error), 1)
    return 0


@dataclass(frozen=True)
class Command:
    """A command: what runs, and which settings of which part are its flags."""

    run: Callable[[dict[str, str]], int]
    part: str
    settings: tuple[str, ...] | None = None
    """None is every setting of the part."""
    argument: str = ""
    """What its positional argument means; empty where it takes none."""
    repeated: bool = False
    """Whether it takes one or more of them."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further flags, which are no settings, with what argparse is to know of them."""


SUBJECT = "subject"
"""Where a positional argument is kept: no setting has this name."""
EXECUTED = ("device", "micro_batch_tokens", "recompute", "compile", "fsdp")
SIZES = ("max_parameters", "max_mb")
IMPORTED = (
    "out",
    "name",
    "scheme",
    "bits",
    "block_size",
    "texts",
    "max_positions",
    "source_language",
    "target_language",
)
SCORED = ("data", "recipe", "limit", "write")
RECIPE = "Name of a shipped recipe, or path of a TOML file."
COMMANDS = {
    "serve": Command(serve, "service"),
    "add-key": Command(
        make_key,
        "service",
        ("api_keys_file",),
        "Name of the key's holder, for bills and logs: letters, digits, - and _.",
        options={
            "admin": {"action": "store_true", "default": None, "help": "See every key's bills, and load models."},
            "requests-per-minute": {"type": int, "metavar": "N", "help": "Texts asked for in a minute, at most."},
            "tokens-per-minute": {
                "type": int,
                "metavar": "N",
                "help": "Tokens read and written in a minute, at most.",
            },
            "concurrency": {"type": int, "metavar": "N", "help": "Texts waiting or running at once, at most."},
            "daily-budget-j": {"type": float, "metavar": "J", "help": "Joules in a day (UTC), at most."},
        },
    ),
    "models": Command(models, "service", ("models",)),
    "calibrate": Command(calibrate, "service", ("models", "state", "threads", "max_batch_tokens", "device", "gpus")),
    "meters": Command(
        meters,
        "service",
        ("meter", "powercap_root", "watts_per_core", "sample_interval_ms"),
        options={
            "json": {"action": "store_const", "const": "true", "help": "Print one JSON document."},
            "stream": {
                "action": "store_const",
                "const": "true",
                "help": "Print readings as lines of JSON until stopped, for a server that sends no bills.",
            },
            "pid": {
                "type": int,
                "metavar": "PID",
                "help": "With --stream: where joules are estimated, those of this process and its descendants.",
            },
        },
    ),
    "train": Command(train, "training", ("data", "runs", "out", "threads", *SIZES, *EXECUTED), RECIPE),
    "distil-data": Command(distil_data, "training", ("data", "runs", "limit"), RECIPE),
    "plan": Command(
        plan,
        "training",
        ("task", "max_mb", "max_joules", "hours", "data", "runs", "out", "threads"),
        options={"recipe": {"metavar": "FILE", "help": "Where to write the recipe of the proposal, a .toml."}},
    ),
    "few-shot": Command(
        few_shot, "training", ("data", "threads"), "few-shot, the study that ships, or path of a TOML file."
    ),
    "export": Command(export, "training", ("data", "runs", "out", *SIZES), RECIPE),
    "import": Command(
        import_,
        "training",
        IMPORTED,
        "Folder of a model that transformers saved or that was exported before, or a Hub name.",
    ),
    "confidence": Command(confidence, "training", ("data", "recipe", "limit"), "Folder of an exported model."),
    "evaluate": Command(evaluate, "training", SCORED, "Folder of an exported model."),
    "quantise": Command(quantise, "training", SCORED, "Folder of an exported model.", repeated=True),
    "frontier": Command(
        frontier,
        "training",
        (),
        "Folder of an exported model.",
        repeated=True,
        options={"out": {"metavar": "FILE", "help": "The page; pictures go beside it. [docs/frontier.md]"}},
    ),
    "training-report": Command(
        training_report,
        "training",
        ("runs", "out"),
        "Name of a run.",
        repeated=True,
        options={"html": {"metavar": "FILE", "help": "The page. [training-report.html]"}},
    ),
    "search-speed": Command(
        search_speed, "training", ("data", "recipe", "passages"), "Folder of a model that answers, or embeds."
    ),
    "energy": Command(energy, "energy", argument="report: what the requests of a time cost."),
}


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("wattle", description="Five NLP tasks over HTTP, each answer with its joules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("loadtest", help=(loadtest.__doc__ or "").partition("\n")[0], add_help=False)
    for name, command in COMMANDS.items():
        summary = (command.run.__doc__ or "").partition("\n")[0]
        flags = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        # Only the command that is asked for learns its flags: the other part may not be installed.
        if name in arguments[:1]:
            _add_flags(flags, command)
    return parser


def _add_flags(parser: argparse.ArgumentParser, command: Command) -> None:
    if command.argument:
        several: dict[str, Any] = {"nargs": "+"} if command.repeated else {}
        parser.add_argument(SUBJECT, metavar="NAME", help=command.argument, **several)
    for name, known in command.options.items():
        parser.add_argument(f"--{name}", **known)
    module = importlib.import_module(f"{command.part}.settings")
    fields = module.Settings.model_fields
    for setting in tuple(fields) if command.settings is None else command.settings:
        # A switch needs no value; every other setting is read from its text by the part's own settings.
        kind: dict[str, Any] = {"metavar": setting.upper()}
        if fields[setting].annotation is bool:
            kind = {"action": "store_const", "const": "true"}
        help = f"{fields[setting].description} [{module.ENV_PREFIX}{setting.upper()}]".replace("%", "%%")
        parser.add_argument(f"--{setting.replace('_', '-')}", dest=setting, help=help, **kind)


def _fail(message: str, status: int) -> int:
    print(f"wattle: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
