"""What two processes do together for ``test_distributed``; torchrun starts it with a data folder and a place to write.

Its cases are in ``CASES``, so that the test can carry out the same in one process.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

from tests.training import recipes
from training import loop
from training.distributed import Execution, Layout, join
from training.train import train

FIT = {**recipes.FIT, "batch_tokens": 96, "log_every_s": 0}
CASES = {
    "ddp": (recipes.translate(fit=FIT), {}),
    "ddp in parts": (recipes.summarize(fit=FIT), {"micro_batch_tokens": 48, "recompute": True}),
    "ddp muon": (recipes.translate(fit={**FIT, "optimiser": "muon"}), {}),
    "fsdp": (recipes.translate(fit=FIT), {"fsdp": True}),
    "fsdp muon": (recipes.translate(fit={**FIT, "optimiser": "muon"}), {"fsdp": True}),
    "fsdp float16": (recipes.translate(fit={**FIT, "precision": "float16"}), {"fsdp": True, "recompute": True}),
}


def carry_out(case: str, data: Path, runs: Path, layout: Layout, checkpoint_every_s: float = 300, **changes):
    recipe, execution = CASES[case]
    recipe = recipe.model_copy(
        update={"fit": recipe.fit.model_copy(update={"checkpoint_every_s": checkpoint_every_s})}
    )
    return train(recipe, data, runs, Execution(layout, **{**execution, **changes}))


@contextlib.contextmanager
def killed_at(step):
    """Every process stops where it would write the checkpoint after ``step``."""
    whole = loop.gather

    def gather(model, optimisers, scaler, steps, progress, same):
        if progress.step > step:
            raise KeyboardInterrupt
        return whole(model, optimisers, scaler, steps, progress, same)

    with mock.patch.object(loop, "gather", gather), contextlib.suppress(KeyboardInterrupt):
        yield


def main(data: Path, out: Path) -> None:
    with join("cpu") as layout:
        joules = {case: carry_out(case, data, out / case, layout).progress.joules for case in CASES}
        for name in ("goes on alone", "goes on as ddp"):
            with killed_at(3):
                carry_out("fsdp", data, out / name, layout, checkpoint_every_s=0)
        carry_out("ddp", data, out / "goes on as ddp", layout)
        (out / f"joules.{layout.rank}.json").write_text(json.dumps(joules))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
