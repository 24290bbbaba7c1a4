"""Clients in a closed loop: each sends its next request when the last is answered. Standard library only.

    python -m loadtests.peers.http_client '{"url": ..., "bodies": [...], "clients": 8, "seconds": 3}'

prints one line of JSON: how many requests were answered, how fast, and the first answer to each body. Clients share
the cores with the server, so they do as little as they can: a connection each that is kept, requests that were
encoded before, and of an answer its head and its length. Knows nothing of who answers.
"""

import asyncio
import json
import re
import sys
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

WARM_UP_SHARE = 0.2
"""Of the time: answered, and not counted."""
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_OK = 200


class Load:
    """What all clients share: the requests, and what became of them."""

    def __init__(self, url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> None:
        self.address = urlsplit(url)
        self.requests = [_request(self.address.netloc, self.address.path, body) for body in bodies]
        self.clients = clients
        self.counted_from_s = time.monotonic() + seconds * WARM_UP_SHARE
        self.end_s = time.monotonic() + seconds
        self.total = 0
        self.took_s: list[float] = []
        """Of each answer that counts."""
        self.answers: dict[int, bytes] = {}
        """The first one to each body, by its place."""
        self.failure: str | None = None


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, load: Load, number: int, done: "asyncio.Future[None]") -> None:
        self._load, self._number, self._done = load, number, done
        self._received = b""
        self._wanted: int | None = None
        """How long the answer is with its head; None as long as that has not come."""
        self._head = b""
        self._began_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None if self._done.done() else "the server closed the connection")

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._wanted is None:
            end = self._received.find(_HEAD_END)
            if end < 0:
                return
            self._head = self._received[:end]
            length = _LENGTH.search(self._head)
            if length is None:
                self._end("an answer does not say how long it is")
                return
            self._wanted = end + len(_HEAD_END) + int(length[1])
        if len(self._received) >= self._wanted:
            self._answered(self._received[len(self._head) + len(_HEAD_END) :])

    def _ask(self) -> None:
        self._received, self._wanted = b"", None
        self._began_s = time.monotonic()
        self._transport.write(self._load.requests[self._number % len(self._load.requests)])

    def _answered(self, body: bytes) -> None:
        load, now_s = self._load, time.monotonic()
        load.total += 1
        status = int(self._head[9:12])
        if status != _OK:
            self._end(f"{status}: {body[:200].decode(errors='replace')}")
        elif load.failure is not None or now_s >= load.end_s:
            self._end(None)
        else:
            load.answers.setdefault(self._number % len(load.requests), body)
            if now_s >= load.counted_from_s:
                load.took_s.append(now_s - self._began_s)
            self._number += load.clients
            self._ask()

    def _end(self, failure: str | None) -> None:
        self._load.failure = self._load.failure or failure
        if not self._done.done():
            self._done.set_result(None)
        self._transport.close()


async def drive(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """Requests for ``seconds``; what is in flight at the end is not counted."""
    load, loop = Load(url, bodies, clients, seconds), asyncio.get_running_loop()
    ends = [loop.create_future() for _ in range(clients)]
    host, port = load.address.hostname or "127.0.0.1", load.address.port or 80
    for number, end in enumerate(ends):
        await loop.create_connection(partial(_Client, load, number, end), host, port)
    await asyncio.gather(*ends)
    if load.failure is not None or not load.took_s:
        return {"error": load.failure or "no request was answered in time"}
    took_s = sorted(load.took_s)
    return {
        "all_requests": load.total,
        "per_s": len(took_s) / (load.end_s - load.counted_from_s),
        "p50_s": took_s[len(took_s) // 2],
        "p95_s": took_s[int(len(took_s) * 0.95)],
        "client_cpu_s": time.process_time(),
        "answers": {place: json.loads(body) for place, body in load.answers.items()},
    }


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    return head.encode() + _HEAD_END + content


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(**json.loads(sys.argv[1])))))
