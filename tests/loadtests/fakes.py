"""A server of exact joules that can be slow, fail, send no bills, leak energy or die."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loadtests.samples import Sample

PROVISIONAL_J, SETTLED_J, ACTIVE_J = 9.0, 0.5, 0.125
"""Of every request; binary fractions, so that sums are exact."""
IDLE_J = 10.0
"""Unattributed since the server started, and as much again for every scrape."""


class FakeServer:
    """Answers every task in Wattle's dialect, chats in OpenAI's, and gives ``{"inputs"}`` an answer."""

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        fail_every: int = 0,
        bills: bool = True,
        leak_j: float = 0.0,
        die_after: int = 0,
        streams: bool = True,
    ) -> None:
        self.delay_s = delay_s
        self.fail_every = fail_every
        self.bills = bills
        self.leak_j = leak_j
        self.die_after = die_after
        self.streams = streams
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        """Path and body of every request."""
        self.billed = 0
        self.scrapes = 0
        self.dead = False
        self.lock = threading.Lock()
        fake = self

        class Handler(_Handler):
            server_of = fake

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        if not self.dead:
            self.dead = True
            self.server.shutdown()
            self.server.server_close()

    def exposition(self) -> str:
        """A balanced account, but for what leaks."""
        with self.lock:
            self.scrapes += 1
            attributed = self.billed * SETTLED_J
            idle = self.scrapes * IDLE_J
            meter = attributed + idle + self.billed * self.leak_j
        return (
            f'wattle_meter_energy_joules_total{{device="cpu",source="fake"}} {meter}\n'
            f'wattle_energy_residual_joules{{device="cpu"}} 0\n'
            f'wattle_attributed_energy_joules_total{{device="cpu",task="translate"}} {attributed}\n'
            f'wattle_unattributed_energy_joules_total{{device="cpu",reason="idle"}} {idle}\n'
        )


class _Handler(BaseHTTPRequestHandler):
    server_of: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fake = self.server_of
        if self.path == "/metrics" and fake.bills:
            self._send(200, fake.exposition().encode())
        elif self.path.startswith("/v1/energy/requests/") and fake.bills:
            self._json(200, {"energy": energy(SETTLED_J, settled=True)})
        elif self.path == "/readyz":
            self._json(200, {"models": [{"name": "fake-en", "bits": 8}]})
        elif self.path == "/openapi.json":
            properties = {"stream": {}} if fake.streams else {}
            self._json(200, {"components": {"schemas": {"GenerateRequest": {"properties": properties}}}})
        else:
            self._json(404, {"error": {"message": "no such path", "code": "route_not_found"}})

    def do_POST(self) -> None:
        fake = self.server_of
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with fake.lock:
            fake.bodies.append((self.path, body))
            number = len(fake.bodies)
        if fake.dead or (fake.die_after and number >= fake.die_after):
            self.close_connection = True
            threading.Thread(target=fake.close).start()
            return
        time.sleep(fake.delay_s)
        if fake.fail_every and number % fake.fail_every == 0:
            self._json(500, {"error": {"message": "an internal error", "code": "internal_error"}})
            return
        with fake.lock:
            fake.billed += 1
        answer: dict[str, Any] = {"model": "fake-en", "usage": {"input_tokens": 8, "output_tokens": 4}}
        if fake.bills:
            answer["energy"] = energy(PROVISIONAL_J, settled=False)
        identity = {"x-request-id": f"req-{number}"} if fake.bills else {}
        if not body.get("stream"):
            self._json(200, answer, identity)
            return
        events = [
            {"index": 0, "delta": "A"},
            {"index": 0, "delta": " dog"},
            {"results": [{"text": "A dog"}], **answer},
        ]
        content = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._send(200, content.encode(), {**identity, "content-type": "text/event-stream"})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read the answers."""

    def _json(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(document).encode(), {"content-type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


def energy(allocated_j: float, settled: bool) -> dict[str, Any]:
    """A bill."""
    return {
        "active_j": ACTIVE_J,
        "allocated_j": allocated_j,
        "gco2e": 0.25,
        "quality": "measured",
        "settled": settled,
    }


def sample(at_s: float = 0.0, latency_ms: float = 100.0, **fields: Any) -> Sample:
    """An answered translation with a settled bill."""
    known = {
        "status": 200,
        "output_tokens": 4,
        "active_j": ACTIVE_J,
        "allocated_j": SETTLED_J,
        "gco2e": 0.25,
        "quality": "measured",
        "settled": True,
        "model": "fake-en",
    }
    asked = {"task": "translate", "texts": 1, "streamed": False}
    return Sample(**{"at_s": at_s, "latency_ms": latency_ms, **asked, **known, **fields})
