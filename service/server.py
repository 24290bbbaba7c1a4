"""Runs the application under uvicorn: one process, one socket, until a signal. Knows nothing of tasks."""

import gc
import ipaddress
import logging.config
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.engine.devices import gpus
from service.engine.engine import engine_settings
from service.models import Models
from service.settings import Settings

TURN_S = 0.001
"""How long a thread may keep the interpreter while others want it. By default it is 5 ms, and whatever comes for the
event loop waits so long, again and again, where executors prepare their steps."""

_MORE_OBJECTS = 10_000
"""From which on garbage is looked for among new objects."""

KEEP_ALIVE_S = 75
"""How long a connection may be idle: longer than clients and proxies keep theirs (nginx and load balancers 60 s), or
one is used in the moment in which it is closed, and what was posted is lost."""

_CONNECTIONS_A_ROUND = 16
"""uvloop takes one connection from a socket in each of its rounds. Under load these grow long, and connections would
wait for theirs for seconds, where all that most of them would get is a refusal: so it has the socket several times."""


class CannotListen(Exception):
    """The address is taken or not this machine's, or others could reach it without a key; the message says which."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and announce it once requests can come."""
        await super().startup(sockets)
        # Until now ``wattle serve`` has left collections of garbage out.
        calm_collector()
        gc.enable()
        if self.started:
            self._announce()


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, finish what runs, and return the exit status.

    Raises ``CannotListen``, ``KeysFileError`` and ``DeviceUnavailable``.
    """
    may_be_reached = settings.insecure or settings.api_keys_file is not None
    with _listen(settings.host, settings.port, may_be_reached) as listener:
        # What is asked wrongly is known before anything is loaded, and told in a line of its own, not in the log.
        gpus(engine_settings(settings))
        app = create_app(settings)
        logging.config.dictConfig(_logging(settings.log_level.upper()))
        sys.setswitchinterval(TURN_S)
        server = _Server(server_config(app, settings), lambda: print(banner(app, listener), flush=True))
        with ExitStack() as stack:
            others = [stack.enter_context(listener.dup()) for _ in range(_CONNECTIONS_A_ROUND - 1)]
            server.run(sockets=[listener, *others])
    return 0 if server.started else 1


def calm_collector() -> None:
    """Have garbage collected rarely, for that holds everybody up.

    What is there now stays, and nobody need look at it. Of requests nothing is left that only a collector would find,
    but between two settlements of the account there are thousands of objects: by default they are looked at for every
    700 more, which takes a millisecond.
    """
    gc.freeze()
    gc.set_threshold(_MORE_OBJECTS)


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How connections are held."""
    return uvicorn.Config(
        app,
        log_config=None,
        ws="none",  # nothing speaks it here, and by default whatever library for it there is would be imported
        access_log=False,  # the energy account logs every request, with its bill
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
    )


def banner(app: FastAPI, listener: socket.socket) -> str:
    """Where the service is, and what it serves."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    models: Models = app.state.service.models
    lines = [f"Wattle serves on {address}", f"docs: {address}/docs", f"dashboard: {address}/dashboard", "models:"]
    lines += [
        f"  {model.name:<24} {', '.join(model.manifest.tasks) or '-':<12} {model.manifest.size_bytes / 1e6:6.1f} MB"
        for model in models.served.values()
    ] or ["  none"]
    lines += [f"  refused {refusal.folder_name}: {refusal.reason}" for refusal in models.refused]
    return "\n".join(lines)


def _listen(host: str, port: int, may_be_reached: bool) -> socket.socket:
    """A socket that listens; made before anything is loaded, for a port in use should be known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not may_be_reached and not ipaddress.ip_address(address[0]).is_loopback:
            raise CannotListen(
                f"others can reach {host}, and there are no API keys: make one with `wattle add-key NAME "
                "--api-keys-file FILE` and serve with --api-keys-file FILE (WATTLE_API_KEYS_FILE), or serve everybody "
                "with --insecure (WATTLE_INSECURE=true)"
            )
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def _logging(level: str) -> dict[str, object]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
            "json": {"format": "%(message)s"},
        },
        "handlers": {
            "log": {"class": "logging.StreamHandler", "formatter": "line"},
            "requests": {"class": "logging.StreamHandler", "formatter": "json"},
        },
        "root": {"level": level, "handlers": ["log"]},
        # One line of JSON per request, written by the energy account; and the texts, where they are wanted.
        "loggers": {
            name: {"handlers": ["requests"], "propagate": False} for name in ("wattle.requests", "wattle.texts")
        },
    }
