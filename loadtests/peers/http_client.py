"""Clients in a closed loop: each sends its next request when the last is answered. Runs in the environment `http`.

    python -m loadtests.peers.http_client '{"url": ..., "bodies": [...], "clients": 8, "seconds": 3}'

prints one line of JSON: how many requests were answered, how fast, and the first answer to each body. Speaks HTTP and
nothing else.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp

_WARM_UP_SHARE = 0.2
"""Of the time: answered, and not counted."""


async def drive(url: str, bodies: list[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """Requests for ``seconds``; what is in flight at the end is not counted."""
    took: list[float] = []
    total = 0
    answers: dict[int, Any] = {}
    failures: list[str] = []
    start = time.monotonic()
    counted_from, end = start + seconds * _WARM_UP_SHARE, start + seconds

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        nonlocal total
        number = first
        while not failures:
            place = number % len(bodies)
            began = time.monotonic()
            async with session.post(url, json=bodies[place]) as response:
                answer = await response.json()
                if response.status != 200:
                    failures.append(f"{response.status}: {str(answer)[:200]}")
                    return
            ended = time.monotonic()
            total += 1
            if ended >= end:
                return
            answers.setdefault(place, answer)
            if ended >= counted_from:
                took.append(ended - began)
            number += clients

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=clients), timeout=aiohttp.ClientTimeout(total=120)
    ) as session:
        await asyncio.gather(*(client(session, first) for first in range(clients)))
    if failures or not took:
        return {"error": failures[0] if failures else "no request was answered in time"}
    took.sort()
    return {
        "all_requests": total,
        "per_s": len(took) / (end - counted_from),
        "p50_s": took[len(took) // 2],
        "p95_s": took[int(len(took) * 0.95)],
        "client_cpu_s": time.process_time(),
        "answers": answers,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(drive(**json.loads(sys.argv[1])))))
