"""All classifiers of a folder, one JSON file each. Knows nothing of HTTP or of how heads are fitted.

A file is replaced as a whole: a process that is killed leaves the classifier that was there, or the new one.
"""

import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from models.heads import Head
from service.errors import ClassifierNotFound, ClassifierUnavailable

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
FORMAT_VERSION = 1
_SUFFIX = ".json"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One example."""

    text: str
    label: str


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A head, and all that it takes to make it anew."""

    name: str
    model: str
    """Whose vectors it reads."""
    revision: str
    fingerprint: str
    """Of the model: the vectors of another one cannot be read."""
    labels: Sequence[str]
    """In the order of the head's."""
    examples: Sequence[LabelledText]
    head: Head
    accuracy: float
    """Share of the examples that a head made without them gets right."""
    created_s: float
    """Seconds since 1970 (UTC)."""


class Classifiers:
    """The classifiers of ``folder``; every method may be called from any thread, and files changed by others are seen.

    All raise ``ClassifierUnavailable`` where a file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._read: dict[str, tuple[tuple[int, int, int], Classifier]] = {}
        """What was read, and from which state of its file."""

    def find(self, name: str) -> Classifier:
        """The classifier of that name. Raises ``ClassifierNotFound``."""
        path = self._path(name)
        with self._lock, _explained(name):
            state = _state(path)
            known = self._read.get(name)
            if known is None or known[0] != state:
                known = self._read[name] = state, _load(name, path.read_bytes())
            return known[1]

    def find_all(self) -> list[Classifier]:
        """Every classifier, by name; one that cannot be read is left out and logged."""
        found = []
        for path in sorted(self._folder.glob(f"[a-z0-9]*{_SUFFIX}")):
            try:
                found.append(self.find(path.name.removesuffix(_SUFFIX)))
            except (ClassifierNotFound, ClassifierUnavailable) as error:
                _log.warning("the classifier %s is not listed: %s", path.name, error)
        return found

    def put(self, classifier: Classifier) -> None:
        """Keep a classifier, in the place of one of the same name."""
        self._keep(classifier)

    def renew(self, old: Classifier, new: Classifier) -> None:
        """Put ``new`` in the place of ``old``, unless that has been replaced or deleted meanwhile."""
        with suppress(ClassifierNotFound):
            self._keep(new, instead_of=old)

    def delete(self, name: str) -> None:
        """Forget a classifier. Raises ``ClassifierNotFound``."""
        path = self._path(name)
        with self._lock, _explained(name):
            path.unlink()
            self._read.pop(name, None)

    def _keep(self, classifier: Classifier, instead_of: Classifier | None = None) -> None:
        path = self._path(classifier.name)
        # Of this thread alone: others, and other processes that serve the same folder, write their own.
        partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        with _explained(classifier.name):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb") as file:
                    file.write(_dump(classifier))
                    file.flush()
                    os.fsync(file.fileno())
                # Not before: whoever looks for a classifier on the event loop must not wait for the disk.
                with self._lock:
                    if instead_of is not None and self.find(classifier.name) is not instead_of:
                        return
                    partial.replace(path)
                    self._read[classifier.name] = _state(path), classifier
            finally:
                partial.unlink(missing_ok=True)
            _sync(self._folder)

    def _path(self, name: str) -> Path:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ClassifierNotFound(name)
        return self._folder / f"{name}{_SUFFIX}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Tell callers what the operating system says, which names no path."""
    try:
        yield
    except FileNotFoundError:
        raise ClassifierNotFound(name) from None
    except OSError as error:
        _log.warning("the classifier %s cannot be used: %s", name, error)
        raise ClassifierUnavailable(name, str(error.strerror)) from error


def _state(path: Path) -> tuple[int, int, int]:
    """Differs from before once the file has been replaced."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _sync(folder: Path) -> None:
    """Make a rename outlive the loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _dump(classifier: Classifier) -> bytes:
    return orjson.dumps(
        {"format_version": FORMAT_VERSION} | {name: getattr(classifier, name) for name in Classifier.__slots__},
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _load(name: str, content: bytes) -> Classifier:
    """Raises ``ClassifierUnavailable`` for what ``_dump`` has not written."""
    try:
        document: dict[str, Any] = orjson.loads(content)
        version = document.pop("format_version")
        if version != FORMAT_VERSION:
            raise ClassifierUnavailable(name, f"its format has version {version}; this program reads {FORMAT_VERSION}")
        head = document.pop("head")
        examples = tuple(LabelledText(**each) for each in document.pop("examples"))
        weights, bias = np.array(head["weights"]), np.array(head["bias"])
        return Classifier(**document, examples=examples, head=Head(weights, bias, head["sharpness"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ClassifierUnavailable(name, "its file is damaged; make it anew, or delete it") from error
