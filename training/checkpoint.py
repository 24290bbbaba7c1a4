"""Checkpoints: whole or absent, and of no layout: any number of processes goes on. Knows nothing of steps."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from training.errors import TrainingError
from training.records import Progress

CHECKPOINT = "checkpoint.pt"
State = dict[str, Any]


def gather(
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    steps: int,
    progress: Progress,
    same: Mapping[str, str],
) -> State:
    """The state of a run, whole tensors on the CPU; all processes call it together."""
    state = {
        "model": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
        "scaler": scaler.state_dict(),
        "steps": steps,
        "progress": asdict(progress),
        "same": dict(same),
    }
    return tree_map(_whole, state)  # type: ignore[no-any-return]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.cpu() if isinstance(value, Tensor) else value


def save_checkpoint(run: Path, state: State) -> None:
    """Write the checkpoint whole or not at all: a kill at any moment, or a full disk, leaves the previous one.

    Raises ``TrainingError``.
    """
    partial = run / f"{CHECKPOINT}.partial"
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(run / CHECKPOINT)
    # torch's writer hides the error of the file that it writes to in a RuntimeError.
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        kept = "the one of before stays" if (run / CHECKPOINT).exists() else "there was none before"
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise TrainingError(
            f"{run / CHECKPOINT}: cannot be written: {cause}; {kept}: make room and start again"
        ) from error


def load_checkpoint(
    run: Path,
    model: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    same: Mapping[str, str] | None = None,
) -> tuple[int, Progress]:
    """Put ``run``'s checkpoint into what is given; the run's length in steps and how far it is.

    ``same`` is what must be as it was, by name, with its hash. Raises ``TrainingError`` for a checkpoint of
    another model, or made with other files.
    """
    path = run / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, mark in (same or {}).items():
            if state.get("same", {}).get(name, mark) != mark:
                raise TrainingError(
                    f"{name}: not what {path} was trained with; put that back, or delete {run} to begin anew"
                )
        _restore(model, state["model"])
        for optimiser, saved in zip(optimisers or (), state["optimisers"], strict=optimisers is not None):
            _restore_optimiser(optimiser, saved)
        if scaler is not None and state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        return state["steps"], Progress(**state["progress"])
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, UnpicklingError) as error:
        # torch says first what it loads, then what is wrong with it.
        said = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise TrainingError(
            f"{path}: not a checkpoint of this model ({said[:300]}); "
            "name another runs folder, or delete this run's to begin anew"
        ) from error


def _restore(model: nn.Module, saved: State) -> None:
    now = model.state_dict()
    model.load_state_dict({name: _as(now[name], value) if name in now else value for name, value in saved.items()})


def _restore_optimiser(optimiser: torch.optim.Optimizer, saved: State) -> None:
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    state = {
        index: {
            # Moments have their weight's shape, and its layout.
            name: _as(weights[index], value) if getattr(value, "shape", None) == weights[index].shape else value
            for name, value in each.items()
        }
        for index, each in saved["state"].items()
    }
    optimiser.load_state_dict({**saved, "state": state})


def _as(like: Tensor, value: Tensor) -> Tensor:
    """``value`` laid out over the processes as ``like`` is."""
    if isinstance(like, DTensor) and like.shape == value.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value
