"""Wattle's own engine in a closed loop, without HTTP, tokenising or bills: what a server of it can reach at most.

    python -m loadtests.peers.engine_loop '{"folder": ..., "texts": [...], "clients": 8, "seconds": 3}'

prints one line of JSON, as `http_client` does. As many texts as there are clients are always inside: the next is
submitted as soon as one is answered.
"""

import json
import os
import sys
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tokenizers import Tokenizer

from loadtests.peers.http_client import WARM_UP_SHARE
from models.manifest import Manifest, load_manifest
from service.engine.engine import Engine
from service.engine.settings import EngineSettings
from service.engine.types import EncodeItem, Item, Sampling, WriteItem


class _Model:
    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, load_manifest(folder)


def drive(folder: str, texts: list[str], clients: int, seconds: float, max_tokens: int = 0) -> dict[str, Any]:
    """Compute for ``seconds``; what is inside at the end is not counted. ``max_tokens`` are those of a text that is
    written; 0 is as many as the manifest says."""
    model = _Model(Path(folder))
    engine = Engine({"it": model}, lambda step: None, EngineSettings(executors=len(os.sched_getaffinity(0))))
    tokenizer = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    items = items_of(model.manifest, tokenizer, texts, max_tokens)
    answered: SimpleQueue[int] = SimpleQueue()
    began_s = [0.0] * clients
    took_s: list[float] = []

    def ask(client: int, number: int) -> None:
        began_s[client] = time.monotonic()
        (ticket,) = engine.submit("it", [items[number % len(items)]])
        ticket.future.add_done_callback(lambda future: answered.put(client))

    started_s, started_cpu_s = time.monotonic(), time.process_time()
    counted_from_s, end_s = started_s + seconds * WARM_UP_SHARE, started_s + seconds
    for client in range(clients):
        ask(client, client)
    total = 0
    while (now_s := time.monotonic()) < end_s:
        client = answered.get()
        now_s = time.monotonic()
        if counted_from_s <= now_s < end_s:
            took_s.append(now_s - began_s[client])
        ask(client, total + clients)
        total += 1
    cpu_s = time.process_time() - started_cpu_s
    engine.close()
    took_s.sort()
    return {
        "all_requests": total,
        "per_s": len(took_s) / (end_s - counted_from_s),
        "p50_s": took_s[len(took_s) // 2],
        "p95_s": took_s[int(len(took_s) * 0.95)],
        "cpu_s": cpu_s,
    }


def items_of(manifest: Manifest, tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> list[Item]:
    """What the service makes of ``texts``: greedy where it writes."""
    rows = [tuple(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    if manifest.generation is None:
        return [EncodeItem("it", row) for row in rows]
    return [WriteItem("it", row, Sampling(max_tokens=max_tokens or manifest.generation.max_tokens)) for row in rows]


if __name__ == "__main__":
    print(json.dumps(drive(**json.loads(sys.argv[1]))))
