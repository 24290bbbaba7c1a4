"""Who may pass: every path needs a key but those that are named here. Knows no routes' meaning and no bodies but one.

A route that nobody has thought of is guarded, and so is a path that does not exist.
"""

import base64
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal
from urllib.parse import parse_qsl

from service.caller import Caller, Rates
from service.engine.types import Overloaded
from service.errors import (
    AdminOnly,
    BodyTooLarge,
    HeadersTooLarge,
    InvalidValue,
    MalformedBody,
    RateExceeded,
    TooManyAtOnce,
    Unauthenticated,
    document,
    schemas,
)
from service.keys import Key, Keyring
from service.rates import Rate

Page = Literal["docs", "dashboard", "metrics"]
_TIMEOUT_HEADER = "x-timeout-s"

# Probes have no key. What LibreTranslate's clients ask before they have one tells which languages there are.
PUBLIC = frozenset({"/", "/livez", "/readyz", "/readyz/", "/languages", "/frontend/settings"})
PAGES: dict[Page, tuple[str, ...]] = {
    "docs": ("/docs", "/openapi.json"),
    "dashboard": ("/dashboard", "/dashboard/"),
    "metrics": ("/metrics",),
}
"""Paths that a setting may open; one that ends in a slash is everything below it."""
KEY_IN_BODY = frozenset({"/translate", "/detect"})
"""Where LibreTranslate's clients put their key."""
_ADMIN = "/v1/models/"
"""Below it, whatever changes something is an administrator's."""
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class Gate:
    """Finds out who asks. Without a keyring everybody may, and nobody is known."""

    def __init__(
        self,
        keyring: Keyring | None = None,
        public: Collection[Page] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``public`` are pages that need no key."""
        self._keyring, self._clock = keyring, clock
        self._public = PUBLIC.union(*(PAGES[page] for page in public))
        self._rates: dict[str, Rates] = {}
        """By the names of keys."""

    @property
    def guards(self) -> bool:
        """Whether there are keys."""
        return self._keyring is not None

    def waits_for_body(self, path: str, headers: Mapping[str, str]) -> bool:
        """Whether the key may still come in the body."""
        return self.guards and path in KEY_IN_BODY and not any(_secrets(headers))

    def admit(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Caller:
        """Who asks. Raises ``Unauthenticated``, ``AdminOnly``, ``RateExceeded``, and ``InvalidValue`` for a wrong
        header. ``body`` is read only where ``waits_for_body`` says so.
        """
        timeout_s = _timeout(headers)
        if self._keyring is None or is_public(path, self._public):
            return Caller(timeout_s=timeout_s)
        secret = next(iter(_secrets(headers)), None)
        if secret is None and path in KEY_IN_BODY:
            secret = _secret_in(headers, body)
        key = None if secret is None else self._keyring.find(secret)
        if key is None:
            raise Unauthenticated(given=secret is not None)
        if is_admins(method, path) and not key.admin:
            raise AdminOnly
        who = Caller(key, self._rates_of(key), timeout_s)
        who.knock()
        return who

    def _rates_of(self, key: Key) -> Rates:
        """A key's rates; they begin anew where its limits have changed."""
        rates = self._rates.get(key.name)
        wanted = (key.requests_per_minute, key.tokens_per_minute)
        if rates is None or (rates.requests.per_minute, rates.tokens.per_minute) != wanted:
            rates = self._rates[key.name] = Rates(*(Rate(limit, self._clock) for limit in wanted))
        return rates


def document_gate(openapi: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with what every request meets before its route does, with the keys, and with the errors."""
    openapi["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    openapi["components"]["schemas"] |= schemas()
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            document(operation, MalformedBody, BodyTooLarge, InvalidValue, HeadersTooLarge)
            if method == "post":
                document(operation, Overloaded)
            if is_public(path):
                continue
            # A key is needed where there are any.
            operation["security"] = [{}, {"bearer": []}, {"x-api-key": []}]
            document(operation, Unauthenticated, RateExceeded, *([TooManyAtOnce] if method == "post" else []))
            if is_admins(method.upper(), path):
                document(operation, AdminOnly)
    return openapi


def is_admins(method: str, path: str) -> bool:
    """Whether a request is an administrator's alone."""
    return path.startswith(_ADMIN) and method not in _READING


def is_public(path: str, public: Collection[str] = PUBLIC) -> bool:
    """Whether a path is one of ``public``, or below one that ends in a slash."""
    return path in public or any(
        path.startswith(folder) for folder in public if folder.endswith("/") and folder != "/"
    )


def _secrets(headers: Mapping[str, str]) -> Iterable[str]:
    """What a request's headers bring as a key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and given.strip():
        yield given.strip()
    elif scheme.lower() == "basic" and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        # A browser asks its user, and sends the answer by itself from then on: with our own pages' requests alone,
        # for another site must not spend a user's joules.
        yield _password(given)
    if "x-api-key" in headers:
        yield headers["x-api-key"]


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _secret_in(headers: Mapping[str, str], body: bytes) -> str | None:
    """LibreTranslate's ``api_key``; None where a body has none, or cannot be read: its route says so."""
    try:
        if headers.get("content-type", "").startswith("application/json"):
            told = json.loads(body)
        else:
            told = dict(parse_qsl(body.decode()))
    except (ValueError, RecursionError):
        return None
    secret = told.get("api_key") if isinstance(told, dict) else None
    return secret if isinstance(secret, str) and secret else None


def _timeout(headers: Mapping[str, str]) -> float | None:
    told = headers.get(_TIMEOUT_HEADER)
    if told is None:
        return None
    try:
        timeout_s = float(told)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidValue(_TIMEOUT_HEADER, "must be a number of seconds above 0")
    return timeout_s
