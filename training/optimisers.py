"""What turns gradients into steps: the schedule and the optimisers. Knows nothing of devices or data."""

from torch import nn, optim

from training.recipe import FitRecipe


def learning_rate_factor(step: int, steps: int, fit: FitRecipe) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): linear up, flat, linear down to zero at ``steps``."""
    warm, fall = max(1, round(fit.warmup * steps)), max(1, round(fit.decay * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / fall)


def make_optimisers(model: nn.Module, fit: FitRecipe) -> list[optim.Optimizer]:
    """AdamW for all weights, or Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest, heads too.

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
        # With this scaling a Muon update is as large as an AdamW one, and takes its learning rate.
        muon = optim.Muon(layers, lr=fit.learning_rate, weight_decay=fit.weight_decay, adjust_lr_fn="match_rms_adamw")
        groups = [undecayed, {"params": heads, "weight_decay": fit.weight_decay}] if heads else [undecayed]
        return [muon, optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.95), fused=True)]
    groups = [{"params": layers + heads, "weight_decay": fit.weight_decay}, undecayed]
    return [optim.AdamW(groups, lr=fit.learning_rate, betas=(0.9, 0.98), fused=True)]
