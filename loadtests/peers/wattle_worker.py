"""Wattle's own engine, run in its own environment as the service runs it, without HTTP and without bills.

The one file here that imports the service: a peer is compared engine against engine.
"""

from dataclasses import dataclass
from pathlib import Path

from loadtests.peers.worker import Ids, Load, Run, Runner, serve
from models.manifest import Manifest, load_manifest
from service.engine.engine import Engine
from service.engine.settings import EngineSettings
from service.engine.types import EncodeItem, EncodeOutput, Item, Sampling, WriteItem, WriteOutput


@dataclass(frozen=True, slots=True)
class _Model:
    manifest: Manifest
    folder: Path


def load(order: Load) -> Runner:
    """A runner of the artefact in ``order.folder``."""
    folder = Path(order.folder)
    model = _Model(load_manifest(folder), folder)
    settings = EngineSettings(
        executors=order.replicas,
        threads=order.threads,
        max_batch_tokens=order.batch_tokens,
        prefix_bytes=0,  # the same prompts come again in every round, and are to be read again
    )
    engine = Engine({"it": model}, lambda step: None, settings)
    return lambda run: compute(engine, run)


def compute(engine: Engine, run: Run) -> list[list[float]] | Ids:
    """Submit all rows at once and wait for the last."""
    sampling = Sampling(max_tokens=run.new_tokens, beams=run.beams)
    items: list[Item] = [
        WriteItem(f"{number}", tuple(row), sampling) if run.new_tokens else EncodeItem(f"{number}", tuple(row))
        for number, row in enumerate(run.rows)
    ]
    found: list[list[float]] | Ids = []
    for ticket in engine.submit("it", items):
        match ticket.future.result():
            case WriteOutput(output_ids=ids):
                found.append(list(ids))
            case EncodeOutput(logits=vector):
                found.append(vector.tolist())
    return found


if __name__ == "__main__":
    serve(("onnxruntime",), load)
