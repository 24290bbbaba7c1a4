"""A server of this repository, started for a load test and stopped after it. Knows only its command line."""

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

STOP_S = 45.0
"""A server that stops finishes its requests first; after this long it is killed."""
_ADDRESS = re.compile(r"serves on (http://\S+)")


class CannotServe(Exception):
    """The server did not start; the message holds what it said last."""


@contextlib.contextmanager
def serve(settings: Mapping[str, str], out: Path) -> Iterator[str]:
    """The address of a ``wattle serve`` with these settings, on a free port, its log and ledger in ``out``.

    Raises ``CannotServe``.
    """
    out.mkdir(parents=True, exist_ok=True)
    chosen = {"port": "0", "ledger": str(out / "ledger.sqlite"), **settings}
    flags = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", value)]
    log = out / "server.log"
    with log.open("w", encoding="utf-8") as errors:
        # A session of its own: the interrupt that ends the load must not end the server before its bills are read.
        process = subprocess.Popen(
            [sys.executable, "-m", "wattle", "serve", *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield _await_address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _await_address(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        found = _ADDRESS.search(line)
        if found:
            return found[1]
    said = log.read_text(encoding="utf-8").strip().splitlines()
    raise CannotServe(f"the server did not start: {said[-1] if said else 'it said nothing'}")
