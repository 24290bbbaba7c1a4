"""The server under test, beside its load: is it alive, its metrics, its bills. Plain HTTP, follows no redirect."""

import ipaddress
import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from loadtests.balance import Scrape, read_scrape
from loadtests.samples import Sample

ASKERS = 8
"""Bills asked for at once."""


class BadTarget(ValueError):
    """An address that must not or cannot be tested; the message says what to change."""


class Target:
    """A server by its address, ``http://host:port`` or with a path before the routes. Raises ``BadTarget``.

    One that is not on this machine is refused unless ``allow_remote``: a load test of somebody else's server is an
    attack, and joules can be metered on this machine only.
    """

    def __init__(
        self, address: str, *, allow_remote: bool = False, api_key: str | None = None, timeout_s: float = 10.0
    ) -> None:
        parts = urlsplit(address if "//" in address else f"http://{address}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadTarget(f"{address!r} is no address; write, for example, http://127.0.0.1:8000")
        try:
            self.port = parts.port or (443 if parts.scheme == "https" else 80)
            found = socket.getaddrinfo(parts.hostname, self.port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            raise BadTarget(f"{address}: {error}") from error
        addresses = {str(each[4][0]).partition("%")[0] for each in found}
        if not allow_remote and not all(ipaddress.ip_address(each).is_loopback for each in addresses):
            raise BadTarget(
                f"{address} is {', '.join(sorted(addresses))}, which is not this machine; "
                "--allow-remote tests it all the same, if it is yours to test"
            )
        self.host = parts.hostname
        self.base = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._prefix = parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._timeout_s = timeout_s

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body. Raises ``OSError`` where no answer comes."""
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self.host, self.port, timeout=self._timeout_s)
        try:
            connection.request("GET", self._prefix + path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read()
        except HTTPException as error:
            raise ConnectionError(f"{path}: {error!r}") from error
        finally:
            connection.close()

    def is_alive(self) -> bool:
        """Whether it takes connections."""
        try:
            socket.create_connection((self.host, self.port), timeout=self._timeout_s).close()
        except OSError:
            return False
        return True

    def scrape(self) -> Scrape | None:
        """Its energy account; None where it has none or cannot say."""
        try:
            status, body = self.get("/metrics")
            return read_scrape(body.decode("utf-8")) if status == 200 else None
        except (OSError, ValueError):
            return None

    def streams(self) -> bool:
        """Whether its native routes stream, by its own description of them."""
        try:
            status, body = self.get("/openapi.json")
            schemas = json.loads(body)["components"]["schemas"] if status == 200 else {}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return "stream" in schemas.get("GenerateRequest", {}).get("properties", {})

    def models(self) -> list[dict[str, Any]]:
        """What it says of the models that it serves; empty where it does not say."""
        try:
            status, body = self.get("/readyz")
            models = json.loads(body).get("models") if status == 200 else None
        except (OSError, ValueError, AttributeError):
            return []
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []

    def settle(
        self, samples: Sequence[Sample], patience_s: float, progress: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Replace bills that are not final by those that the server has settled since, as long as ``patience_s``.

        A server that keeps no bills, or has died, is not asked for all of them; what is not settled stays as it was.
        """
        waiting = [sample for sample in samples if sample.request_id and not sample.settled]
        total = len(waiting)
        deadline_s = time.monotonic() + patience_s
        with ThreadPoolExecutor(ASKERS) as pool:
            while waiting and any(pool.map(self._bill, waiting[:ASKERS])):
                for sample, energy in zip(waiting, pool.map(self._bill, waiting), strict=True):
                    sample.take_bill(energy or {})
                waiting = [sample for sample in waiting if not sample.settled]
                progress(total - len(waiting), total)
                if time.monotonic() >= deadline_s:
                    return
                time.sleep(0.5 if waiting else 0)

    def _bill(self, sample: Sample) -> dict[str, Any] | None:
        try:
            status, body = self.get(f"/v1/energy/requests/{sample.request_id}")
            energy = json.loads(body).get("energy") if status == 200 else None
        except (OSError, ValueError, AttributeError):
            return None
        return energy if isinstance(energy, dict) else None
