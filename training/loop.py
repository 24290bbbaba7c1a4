"""The training loop as plain functions: steps over batches, in any layout. Knows nothing of text."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from training.checkpoint import CHECKPOINT, gather, load_checkpoint, save_checkpoint
from training.data import Sized, deal
from training.distributed import Execution, HostMeters, Layout, place, total, unsynchronised
from training.errors import TrainingError
from training.optimisers import learning_rate_factor, make_optimisers
from training.recipe import FitRecipe, Precision
from training.records import Progress, Recorder
from training.tasks import Batch, Loss


@dataclass(frozen=True)
class Work:
    """What a run computes its steps from."""

    loss: Loss
    epoch_batches: Callable[[int], Sequence[Sequence[int]]]
    """Numbers of the samples of each step of an epoch, the same at every call."""
    samples: Callable[[Sequence[int]], Sequence[Sized]]
    """The samples of these numbers."""
    collate: Callable[[Sequence[Any]], Batch]
    """Samples as tensors on the CPU."""
    describe: Callable[[Any], str] = str
    """A sample for a person to find."""
    late: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered for the losses of the last ``fit.quantise_last`` of the steps."""


def fit_model(
    model: nn.Module,
    fit: FitRecipe,
    work: Work,
    run: Path,
    execution: Execution | None = None,
    same: Mapping[str, str] | None = None,
) -> Progress:
    """Train ``model`` in place for ``fit.epochs``, resuming from ``run``'s checkpoint where there is one.

    A checkpoint is written every ``fit.checkpoint_every_s`` and at the end; it is refused where what ``same`` names
    has changed. All processes of the layout call this together. Raises ``TrainingError`` on a loss that is not a
    number and where memory is out: the last good checkpoint stays.
    """
    execution, same = execution or Execution(), same or {}
    layout = execution.layout
    fit = fit.model_copy(update={"precision": precision_on(layout.device, fit.precision)})
    if fit.quantise_last and (execution.fsdp or execution.recompute or execution.compile):
        raise TrainingError("fit.quantise_last looks for whole weights: it goes with no fsdp, recompute or compile")
    steps = max(1, round(fit.epochs * len(work.epoch_batches(0))))
    module = place(model, work.loss, execution)
    optimisers = make_optimisers(model, fit)
    scaler = torch.amp.GradScaler(layout.device.type, enabled=fit.precision == "float16")
    progress = Progress()
    if (run / CHECKPOINT).exists():
        _, progress = load_checkpoint(run, model, optimisers, scaler, same)
        if layout.is_first:
            how = "nothing is left to train, at" if progress.step >= steps else "resumes at"
            print(f"{run.name}: {how} step {progress.step} of {steps}")
    if progress.step < steps:
        progress.device = layout.name
    meters = HostMeters(layout)
    if layout.is_first and meters.source == "none":
        print(f"{run.name}: no joules: {meters.name}")
    recorder = Recorder(run, progress, meters, writes=layout.is_first)
    logged = saved = time.monotonic()
    model.train()
    with tqdm(
        total=steps, initial=progress.step, desc=run.name, unit="step", mininterval=5.0, disable=not layout.is_first
    ) as bar:
        for step in _ahead(_steps(work, execution, progress.step, steps)):
            learning_rate = fit.learning_rate * learning_rate_factor(progress.step, steps, fit)
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = learning_rate
            # Random numbers depend on nothing but the step and the process: a resumed run draws what an unbroken one
            # does, and no state of generators needs to be kept.
            torch.manual_seed(_seed(fit.seed, progress.step, layout.rank))
            late = work.late if progress.step >= steps - round(fit.quantise_last * steps) else nullcontext
            own_loss = _backward(module, fit, step, layout, scaler, late)
            now = time.monotonic()
            last = progress.step + 1 == steps
            due = (
                last or not progress.step or now - logged > fit.log_every_s,
                last or now - saved > fit.checkpoint_every_s,
            )
            # The first process's clock decides for all.
            told = [float(each and layout.is_first) for each in due]
            loss, tokens, log_due, save_due = total(layout, [own_loss, step.tokens, *told])
            norm = _gradient_norm(model, fit, optimisers, scaler)
            # In float16 too large a gradient is the scaler's to mend: it skips the step and scales less.
            if not math.isfinite(loss if scaler.is_enabled() else loss + norm):
                kept = (
                    f"The last checkpoint in {run} is good" if (run / CHECKPOINT).exists() else "No checkpoint is lost"
                )
                raise TrainingError(
                    f"the loss is {loss} and the norm of its gradients {norm} at step {progress.step}, on "
                    f"{len(step.samples)} samples such as {'; '.join(map(work.describe, step.samples[:3]))}. {kept}: "
                    "mend the data or lower the learning rate, and start again"
                )
            for optimiser in optimisers:
                scaler.step(optimiser)
                optimiser.zero_grad(set_to_none=True)
            scaler.update()
            progress.step += 1
            progress.tokens += round(tokens)
            progress.loss = loss if math.isnan(progress.loss) else 0.98 * progress.loss + 0.02 * loss
            if log_due:
                recorder.write(progress, learning_rate)
                logged = time.monotonic()
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {recorder.rates}", refresh=False)
            bar.update()
            if save_due:
                recorder.update(progress)
                state = gather(model, optimisers, scaler, steps, progress, same)
                if layout.is_first:
                    save_checkpoint(run, state)
                saved = time.monotonic()
    total(layout, [0.0])  # nobody reads the last checkpoint before it is there
    model.eval()
    return progress


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class _Step:
    """What one process computes of one step."""

    samples: Sequence[Sized]
    """Of all processes."""
    parts: Sequence[Sequence[Sized]]
    """Its own, as they are computed one after the other; a part may be empty."""
    batches: Sequence[Batch]
    """One for each part, on the CPU."""
    counts: Sequence[float]
    """Its own targets, by part of the loss."""

    @property
    def tokens(self) -> int:
        """Its own real ones."""
        return sum(sample.length for part in self.parts for sample in part)


def _steps(work: Work, execution: Execution, first: int, steps: int) -> Iterator[_Step]:
    """What this process computes from step ``first`` on."""
    layout = execution.layout
    # An epoch's batch count varies by a few with its order, so an epoch is what its own list says.
    epoch, batches, consumed = 0, work.epoch_batches(0), 0
    for number in range(first, steps):
        while number - consumed >= len(batches):
            consumed += len(batches)
            epoch += 1
            batches = work.epoch_batches(epoch)
        samples = work.samples(batches[number - consumed])
        parts = [each[layout.rank] for each in deal(samples, layout.world, execution.micro_batch_tokens)]
        # Processes keep in step: one that got no sample computes any, and lets it count for nothing.
        tensors = [work.collate(part or samples[:1]) for part in parts]
        counts = [
            [count * bool(part) for count in work.loss.count(each)] for each, part in zip(tensors, parts, strict=True)
        ]
        yield _Step(samples, parts, tensors, [sum(column) for column in zip(*counts, strict=True)])


def _ahead(steps: Iterator[_Step]) -> Iterator[_Step]:
    """The same steps, the next one made by a thread while the last is computed."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, steps, None)
        while (step := pending.result()) is not None:
            pending = pool.submit(next, steps, None)
            yield step


def precision_on(device: torch.device, wanted: Precision) -> Precision:
    """``wanted``, or for ``auto`` bfloat16 where ``device`` multiplies it, float32 where it would only imitate it."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"


def _backward(
    module: nn.Module,
    fit: FitRecipe,
    step: _Step,
    layout: Layout,
    scaler: torch.amp.GradScaler,
    phase: Callable[[], AbstractContextManager[object]],
) -> float:
    """Leave the gradients of the step's mean loss; this process's share of that loss."""
    half = getattr(torch, fit.precision)
    divisors = torch.tensor([count or 1.0 for count in total(layout, step.counts)], device=layout.device)
    loss = torch.zeros((), device=layout.device)
    try:
        for index, (part, batch) in enumerate(zip(step.parts, step.batches, strict=True)):
            moved = {name: tensor.to(layout.device) for name, tensor in batch.items()}
            mixed = torch.autocast(layout.device.type, half, enabled=half != torch.float32)
            with unsynchronised(module) if index + 1 < len(step.parts) else nullcontext():
                with mixed, phase():
                    share = module(moved, divisors) * bool(part)
                loss += share.detach()
                # Gradients become the mean over processes, and their sum is wanted.
                scaler.scale(share * layout.world).backward()
        return loss.item()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(_smaller(step.parts)) from error


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no error of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _smaller(parts: Sequence[Sequence[Sized]]) -> str:
    """What to try when the largest of ``parts`` is too large."""
    sizes = [(len(part) * max(sample.length for sample in part), len(part)) for part in parts if part]
    tokens, rows = max(sizes)
    if rows > 1:
        return (
            f"out of memory on {rows} samples of {tokens} padded tokens: start again with --micro-batch-tokens "
            f"{tokens // 2}; steps are then computed in parts and learn the same"
        )
    return f"out of memory on one sample of {tokens} tokens: start again with --recompute, or lower max_tokens"


def _gradient_norm(
    model: nn.Module, fit: FitRecipe, optimisers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler
) -> float:
    """Clip the gradients; the norm that they had, of all processes' shares together."""
    for optimiser in optimisers:
        scaler.unscale_(optimiser)
    norm = nn.utils.clip_grad_norm_(model.parameters(), fit.clip_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
