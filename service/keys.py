"""API keys: the file that keeps their hashes, and whose key a secret is. Knows nothing of HTTP, nor counts anything.

A secret has 256 random bits, so one round of SHA-256 hides it as well as a slow hash would: those are for passwords,
which can be guessed. What a request costs is a microsecond.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SECRET_PREFIX = "wattle-"
"""Tells a scanner of source code what it has found."""
_RELOAD_INTERVAL_S = 1.0
_PREFIX = 16
"""Hexadecimal digits of a hash by which a key is looked up; all of it is compared after that."""
_log = logging.getLogger(__name__)

Limit = Annotated[int | None, Field(ge=1)]


class KeysFileError(Exception):
    """A file of keys cannot be read or written; the message says why and what to do."""


class Key(BaseModel):
    """Who holds a key, and what they may do. A limit that is None is none."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    """Stands for the key wherever it is told: the secret is never kept."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the secret, in hexadecimal digits."""
    admin: bool = False
    """Sees the bills of all keys, and changes what is served."""
    requests_per_minute: Limit = None
    """A list of texts counts as so many requests."""
    tokens_per_minute: Limit = None
    """Read and written."""
    concurrency: Limit = None
    """Texts waiting or running at once."""
    daily_budget_j: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Allocated joules in a day (UTC)."""


_NOBODY = Key(name="nobody", sha256="0" * 64)


class Keyring:
    """The keys of a file, which is read again when it changes; one that cannot be read leaves those that were."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ``KeysFileError``."""
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._keys = _by_prefix(read_keys(path))
        self._next_look_s = clock() + _RELOAD_INTERVAL_S

    def find(self, secret: str) -> Key | None:
        """Whose key ``secret`` is; None where it is nobody's. Takes the same time however much of it is right."""
        self._follow()
        digest = hashlib.sha256(secret.encode(errors="backslashreplace")).hexdigest()
        key = self._keys.get(digest[:_PREFIX], _NOBODY)
        return key if hmac.compare_digest(key.sha256, digest) else None

    def _follow(self) -> None:
        """Read the file again if it has changed, and look no more than once a second."""
        now_s = self._clock()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _RELOAD_INTERVAL_S
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _by_prefix(read_keys(self._path))
        except KeysFileError as error:
            _log.error("the keys stay as they were: %s", error)
        else:
            _log.info("the file of keys was read again: %d keys", len(self._keys))


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file, by name. Raises ``KeysFileError``."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysFileError(f"the file of keys {path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise KeysFileError(f"the file of keys {path} is not TOML: {error}") from error
    keys = {name: _read_key(path, name, table) for name, table in tables.items()}
    if len(_by_prefix(keys)) < len(keys):
        raise KeysFileError(f"the file of keys {path} holds a key under two names")
    return keys


def add_key(path: Path, name: str, limits: Mapping[str, object]) -> str:
    """Add a key to a file, which is made where there is none, and return its secret: nothing else has it.

    ``limits`` are further fields of ``Key``. Raises ``KeysFileError``.
    """
    known = read_keys(path) if path.exists() else {}
    if name in known:
        raise KeysFileError(f"{path} has a key of the name {name}; choose another, or remove that one first")
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    key = _read_key(path, name, {"sha256": hashlib.sha256(secret.encode()).hexdigest(), **limits})
    lines = [f"{field} = {_toml(value)}" for field, value in key.model_dump(exclude={"name"}).items() if value]
    try:
        before = path.read_text(encoding="utf-8") if known else ""
        _replace(path, before + "\n".join((f"[{name}]", *lines, "", "")))
    except OSError as error:
        raise KeysFileError(f"the file of keys {path} cannot be written: {error.strerror}") from error
    return secret


def _read_key(path: Path, name: str, table: object) -> Key:
    if not isinstance(table, dict):
        raise KeysFileError(f"the file of keys {path}: {name} stands outside of a table such as [{name}]")
    try:
        return Key(**{**table, "name": name})
    except ValidationError as error:
        first = error.errors()[0]
        raise KeysFileError(
            f"the file of keys {path}: [{name}] {first['loc'][0]}: {first['msg'][:1].lower()}{first['msg'][1:]}"
        ) from error


def _by_prefix(keys: Mapping[str, Key]) -> dict[str, Key]:
    return {key.sha256[:_PREFIX]: key for key in keys.values()}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file does; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _toml(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{value}"'
        case _:
            return str(value)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, for its owner alone unless it was there with other rights."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(mode)
    partial.replace(path)
