"""The training loop as plain functions: schedule, optimisers, steps, checkpoints. Knows nothing of tasks or text."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.errors import TrainingError
from training.recipe import FitRecipe

CHECKPOINT = "checkpoint.pt"


@dataclass
class Progress:
    """How far a run is and what it has cost, over all of its restarts."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    """CPU seconds of the process, all threads."""
    loss: float = math.nan
    """Exponential mean over about 50 steps."""


def learning_rate_factor(step: int, steps: int, fit: FitRecipe) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): linear up, flat, linear down to zero at ``steps``."""
    warm, fall = max(1, round(fit.warmup * steps)), max(1, round(fit.decay * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / fall)


def make_optimisers(model: nn.Module, fit: FitRecipe) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest.

    Vectors and embeddings do not decay.
    """
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim == 2 and not name.startswith("embed.") else rest).append(weight)
    if fit.optimiser == "muon":
        # With this scaling a Muon update is as large as an AdamW one, and takes its learning rate.
        muon = torch.optim.Muon(
            matrices, lr=fit.learning_rate, weight_decay=fit.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(rest, lr=fit.learning_rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)]
    groups = [{"params": matrices, "weight_decay": fit.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.98), fused=True)]


def fit_model(
    model: nn.Module,
    fit: FitRecipe,
    epoch_batches: Callable[[int], Sequence[Sequence[int]]],
    loss_of: Callable[[Sequence[int]], tuple[Tensor, int]],
    run: Path,
) -> Progress:
    """Train ``model`` in place for ``fit.epochs``, resuming from ``run``'s checkpoint where there is one.

    ``epoch_batches(epoch)`` gives the batches of sample indices, the same at every call; ``loss_of(batch)`` a scalar
    loss and the batch's real tokens. A checkpoint is written every ``fit.checkpoint_every_s`` and at the end.
    Raises ``TrainingError`` on a loss that is not a number: the last good checkpoint stays.
    """
    torch.manual_seed(fit.seed)
    optimisers = make_optimisers(model, fit)
    per_epoch = len(epoch_batches(0))
    steps = max(1, round(fit.epochs * per_epoch))
    progress = _resume(run, model, optimisers, steps)
    started, cpu_started, saved = time.monotonic(), time.process_time(), time.monotonic()
    before = (progress.elapsed_s, progress.cpu_s, progress.tokens)
    model.train()
    # An epoch's batch count varies by a few with its order, so an epoch is what its own list says.
    epoch, batches, consumed = 0, epoch_batches(0), 0
    with tqdm(total=steps, initial=progress.step, desc=run.name, unit="step", mininterval=5.0) as bar:
        while progress.step < steps:
            while progress.step - consumed >= len(batches):
                consumed += len(batches)
                epoch += 1
                batches = epoch_batches(epoch)
            batch = batches[progress.step - consumed]
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = fit.learning_rate * learning_rate_factor(progress.step, steps, fit)
            with torch.autocast("cpu", torch.bfloat16, enabled=fit.precision == "bfloat16"):
                loss, tokens = loss_of(batch)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {progress.step} (samples {list(batch)[:8]}...); the last checkpoint "
                    f"in {run} is good: lower the learning rate and start again"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), fit.clip_norm)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            progress.step += 1
            progress.tokens += tokens
            progress.loss = value if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * value
            progress.elapsed_s = before[0] + time.monotonic() - started
            progress.cpu_s = before[1] + time.process_time() - cpu_started
            rate = (progress.tokens - before[2]) / (time.monotonic() - started)
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            if time.monotonic() - saved > fit.checkpoint_every_s or progress.step == steps:
                _save(run, model, optimisers, steps, progress)
                saved = time.monotonic()
    model.eval()
    return progress


def _save(
    run: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], steps: int, progress: Progress
) -> None:
    """Write the checkpoint whole or not at all: a kill at any moment leaves the previous one."""
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "rng": torch.get_rng_state(),
        "steps": steps,
        "progress": asdict(progress),
    }
    partial = run / f"{CHECKPOINT}.partial"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(run / CHECKPOINT)
    except OSError as error:
        raise TrainingError(f"{partial}: the checkpoint cannot be written: {error}") from error


def _resume(run: Path, model: nn.Module, optimisers: list[torch.optim.Optimizer], steps: int) -> Progress:
    path = run / CHECKPOINT
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    try:
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"{path}: the checkpoint is of another model ({str(error).splitlines()[0]}); "
            "give another --runs folder, or delete it"
        ) from error
    torch.set_rng_state(state["rng"])
    progress = Progress(**state["progress"])
    print(f"{run.name}: resumes at step {progress.step} of {steps}")
    return progress
