"""AdamW with warm-up and cosine decay, and its state as named tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW


def make_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> AdamW:
    """Fused AdamW; matrices decay (also stacked ones and embeddings), norms and biases do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)


def learning_rate_factor(step: int, steps: int, warmup: int, min_ratio: float) -> float:
    """What the learning rate is multiplied by at step = 1, ..., steps.

    Linear up to 1 at `warmup`, then half a cosine down to `min_ratio` at the last step.
    """
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def optimizer_tensors(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The state by parameter name: {"head.weight/exp_avg": ...}."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter]][key] = tensor.to(parameters[parameter].device)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Scalar 2-norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)


def clip_gradients(parameters: list[nn.Parameter], norm: float | Tensor, most: float) -> None:
    """Scale the gradients, whose norm is known, down to the norm `most`; no pass if it is less."""
    if norm > most:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], most / norm)
