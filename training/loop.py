"""The training loop as plain functions: schedule, optimisers, steps, checkpoints. Knows nothing of tasks or text."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from tqdm import tqdm

from energy.meters.choose import MeterSettings, choose_meter
from training.errors import TrainingError
from training.recipe import FitRecipe
from training.records import Progress, Recorder

CHECKPOINT = "checkpoint.pt"


def learning_rate_factor(step: int, steps: int, fit: FitRecipe) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): linear up, flat, linear down to zero at ``steps``."""
    warm, fall = max(1, round(fit.warmup * steps)), max(1, round(fit.decay * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / fall)


def make_optimisers(model: nn.Module, fit: FitRecipe) -> list[torch.optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest.

    Vectors and embeddings do not decay.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
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
    late: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Progress:
    """Train ``model`` in place for ``fit.epochs``, resuming from ``run``'s checkpoint where there is one.

    ``epoch_batches(epoch)`` gives the batches of sample indices, the same at every call; ``loss_of(batch)`` a scalar
    loss and the batch's real tokens; the last ``fit.quantise_last`` of the losses are computed within ``late()``. A
    checkpoint is written every ``fit.checkpoint_every_s`` and at the end.
    Raises ``TrainingError`` on a loss that is not a number: the last good checkpoint stays.
    """
    torch.manual_seed(fit.seed)
    optimisers = make_optimisers(model, fit)
    per_epoch = len(epoch_batches(0))
    steps = max(1, round(fit.epochs * per_epoch))
    progress = Progress()
    if (run / CHECKPOINT).exists():
        _, progress = load_checkpoint(run, model, optimisers)
        print(f"{run.name}: resumes at step {progress.step} of {steps}")
    recorder = Recorder(run, progress, choose_meter(MeterSettings()).meter)
    logged = saved = time.monotonic()
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
            learning_rate = fit.learning_rate * learning_rate_factor(progress.step, steps, fit)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate
            phase = late() if progress.step >= steps - round(fit.quantise_last * steps) else nullcontext()
            with torch.autocast("cpu", torch.bfloat16, enabled=fit.precision == "bfloat16"), phase:
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
            if time.monotonic() - logged > fit.log_every_s or progress.step == steps:
                recorder.write(progress, learning_rate)
                logged = time.monotonic()
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {recorder.rates}", refresh=False)
            bar.update()
            if time.monotonic() - saved > fit.checkpoint_every_s or progress.step == steps:
                recorder.update(progress)
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


def load_checkpoint(
    run: Path, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer] | None = None
) -> tuple[int, Progress]:
    """Put ``run``'s checkpoint into ``model`` and ``optimisers``; the run's length in steps and how far it is.

    With ``optimisers`` the random state is restored too. Raises ``TrainingError`` for another model's checkpoint.
    """
    path = run / CHECKPOINT
    try:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers or (), state["optimisers"], strict=optimisers is not None):
            optimiser.load_state_dict(saved)
    except (RuntimeError, ValueError, LookupError, EOFError, UnpicklingError) as error:
        raise TrainingError(
            f"{path}: not a checkpoint of this model ({str(error).splitlines()[0]}); "
            "name another runs folder, or delete this run's to begin anew"
        ) from error
    if optimisers is not None:
        torch.set_rng_state(state["rng"])
    return state["steps"], Progress(**state["progress"])
