"""What turns gradients into steps: the schedule and the optimisers. Knows nothing of devices or data."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn, optim

from training.recipe import FitRecipe

_MOMENTUM = 0.95
_STEEP = (3.4445, -4.7750, 2.0315)
"""Coefficients of a Newton-Schulz iteration that brings singular values near 1 in 5 rounds (Jordan et al. 2024)."""


def learning_rate_factor(step: int, steps: int, fit: FitRecipe) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): linear up, flat, linear down to zero at ``steps``."""
    warm, fall = max(1, round(fit.warmup * steps)), max(1, round(fit.decay * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / fall)


def make_optimisers(model: nn.Module, fit: FitRecipe) -> list[optim.Optimizer]:
    """AdamW for all weights, or Muon for the layers' matrices and AdamW for the rest, heads too.

    Vectors and embeddings do not decay.
    """
    layers: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or name.startswith("embed."):
            rest.append(weight)
        else:
            (heads if "head" in name.split(".") else layers).append(weight)
    undecayed = {"params": rest, "weight_decay": 0.0}
    if fit.optimiser == "muon":
        muon = Muon(layers, fit.learning_rate, fit.weight_decay, half=fit.precision == "bfloat16")
        groups = [undecayed, {"params": heads, "weight_decay": fit.weight_decay}] if heads else [undecayed]
        return [muon, optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.95), fused=True)]
    groups = [{"params": layers + heads, "weight_decay": fit.weight_decay}, undecayed]
    return [optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.98), fused=True)]


class Muon(optim.Optimizer):
    """Momentum with its singular values made about 1 (Jordan et al. 2024), for matrices.

    An update is as large as one of AdamW (Liu et al. 2025), so it takes AdamW's learning rates. ``torch.optim.Muon``
    does the same, always in bfloat16, which takes processors that only imitate it thirty times as long; here
    ``half`` asks for it.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, *, half: bool = False
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = torch.bfloat16 if half else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients; matrices without one stay."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                ahead = matrix.grad.lerp(momentum, _MOMENTUM)
                size = 0.2 * math.sqrt(max(matrix.shape))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(orthogonalised(ahead.to(self._dtype)), alpha=-size * group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """``matrix`` ``(m, n)`` with singular values between about 0.7 and 1.2, in its precision."""
    a, b, c = _STEEP
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found
