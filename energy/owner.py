"""Which process of this machine bills its idle energy. Knows nothing of requests.

A machine idles once, however many processes serve on it: were each to bill the idle energy that the meter shows, it
would be billed several times. So one process owns a device, the one that holds a lock on a file for it; the kernel
frees the lock when that process ends, and another takes it over within a second.

A process that does not own the processor still bills what its own CPU time takes above idle: counters may have
several readers, and each process takes the others' CPU time for that of other programs. Idle energy it bills to
nobody, so that its bills' allocated energy is their active energy. On a GPU nothing tells two processes apart: who
does not own it bills nothing on it.

Processes find each other through one folder, so processes of other users or in other containers are not seen unless
they share it.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from energy.clock import NS_PER_S

_log = logging.getLogger(__name__)


class Owner:
    """This process's claims to the metered devices, by locks in ``folder``."""

    def __init__(self, folder: Path, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._folder = folder
        self._monotonic_ns = monotonic_ns
        self._held: dict[str, int | None] = {}
        """Descriptors of the locks that are held; None where locks cannot be had."""
        self._tried_ns: dict[str, int] = {}

    def owns(self, device: str) -> bool:
        """Whether this process owns ``device``; it tries for it once a second as long as another does."""
        name = "cpu" if device == "dram" else device
        if name in self._held:
            return True
        now_ns = self._monotonic_ns()
        tried_ns = self._tried_ns.get(name)
        if tried_ns is not None and now_ns - tried_ns < NS_PER_S:
            return False
        self._tried_ns[name] = now_ns
        return self._try(name, first=tried_ns is None)

    def may_count(self, device: str) -> bool:
        """Whether steps on ``device`` can be billed at all: on a GPU, only by its owner."""
        return self.owns(device) or not device.startswith("gpu:")

    def close(self) -> None:
        """Let others have the devices."""
        for descriptor in self._held.values():
            if descriptor is not None:
                os.close(descriptor)
        self._held.clear()

    def _try(self, name: str, first: bool) -> bool:
        path = self._folder / f"meter-{name.replace(':', '-')}.lock"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            _log.warning(
                "cannot tell whether another process meters %s and bills its idle energy too: %s", name, error
            )
            self._held[name] = None
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if first:
                other = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
                means = "no bill here holds any of it" if name == "cpu" else "steps on it have no bill here"
                _log.warning("process %s meters %s and bills its idle energy: %s", other, name, means)
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._held[name] = descriptor
        if not first:
            _log.warning("this process now meters %s and bills its idle energy", name)
        return True
