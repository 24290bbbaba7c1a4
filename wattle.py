"""The command line: ``wattle serve`` and ``wattle models``. Imports the part it needs when it needs it."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 1 where it failed, 2 where it was asked wrongly."""
    options = vars(_parser().parse_args(arguments))
    command = COMMANDS[options.pop("command")]
    try:
        return command({name: value for name, value in options.items() if value is not None})
    except KeyboardInterrupt:
        return 130


def serve(flags: dict[str, str]) -> int:
    """Serve the models over HTTP until SIGTERM or SIGINT."""
    from service.server import CannotListen
    from service.server import serve as run
    from service.settings import read_settings

    try:
        return run(read_settings(**flags))
    except CannotListen as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)


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
                ", ".join(manifest.tasks),
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


# One line per command: what argparse calls it, and what runs.
COMMANDS = {"serve": serve, "models": models}


def _parser() -> argparse.ArgumentParser:
    from service.settings import ENV_PREFIX, Settings

    parser = argparse.ArgumentParser("wattle", description="Five NLP tasks over HTTP, each answer with its joules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = {"serve": tuple(Settings.model_fields), "models": ("models",)}
    for name, run in COMMANDS.items():
        summary = (run.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        for setting in wanted[name]:
            field = Settings.model_fields[setting]
            command.add_argument(
                f"--{setting.replace('_', '-')}",
                dest=setting,
                metavar=setting.upper(),
                help=f"{field.description} [{ENV_PREFIX}{setting.upper()}]".replace("%", "%%"),
            )
    return parser


def _fail(message: str, status: int) -> int:
    print(f"wattle: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
