"""Weights of experts, however a model keeps them: stacked, transposed, interleaved or one by one.

Shapes: E experts, F width, D model. Biases are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Weights = tuple[Tensor, Tensor, Tensor]
# What gate, up and down projection are called where each is one linear map, and where the first two
# are the halves of one.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
JOINT = (("gate_up_proj", "down_proj"), ("gate_up", "down"))


def expert_weights(experts: nn.Module, num_experts: int) -> Weights:
    """gate (E, F, D), up (E, F, D), down (E, D, F); a gate of zeros where experts have none.

    Raises `ValueError` for another layout, and for numbers that are packed.
    """
    joint, up, down = (getattr(experts, n, None) for n in ("gate_up_proj", "up_proj", "down_proj"))
    up = up if joint is None else joint
    if isinstance(up, Tensor) and isinstance(down, Tensor):
        _check_plain(experts, up, down)
        return _stacked(experts, up, down, gated=joint is not None)
    for part in experts.modules():
        several = isinstance(part, nn.ModuleList) and len(part) >= num_experts
        if several and all(map(mlp_weights, part.children())):
            return listed_weights([*part.children()])
    own = [name for name, _ in experts.named_parameters(recurse=False)]
    have = ", ".join(own) or "no parameters of its own"
    raise ValueError(
        f"{type(experts).__name__} has {have}: no layout of experts that is known here"
    )


def listed_weights(experts: Sequence[nn.Module]) -> Weights:
    """The same of experts one by one. Raises `ValueError` where they are no gated networks whose
    projections can be told from each other."""
    found = [mlp_weights(one) for one in experts]
    if not all(found):
        raise ValueError(
            f"{type(experts[0]).__name__} has no linear maps {' or '.join(map(str, NAMES))}: no "
            "layout of experts that is known here"
        )
    gate_EFD, up_EFD, down_EDF = map(torch.stack, zip(*filter(None, found), strict=True))
    return gate_EFD, up_EFD, down_EDF


def _stacked(experts: nn.Module, up: Tensor, down: Tensor, gated: bool) -> Weights:
    if getattr(experts, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not gated:
        return torch.zeros_like(up), up, down
    if getattr(experts, "is_concatenated", True):
        gate, up = up.chunk(2, dim=1)
    else:
        gate, up = up[:, ::2], up[:, 1::2]
    return gate[: len(down)], up[: len(down)], down  # longcat_flash has rows for no expert, too


def _check_plain(experts: nn.Module, *weights: Tensor) -> None:
    for weight in weights:
        if not weight.is_floating_point() or weight.ndim != 3 or weight.itemsize < 2:
            raise ValueError(
                f"{type(experts).__name__} keeps its weights packed ({weight.dtype}, "
                f"{tuple(weight.shape)}): metrics of weights need them dequantized"
            )


def mlp_weights(module: nn.Module) -> Weights | None:
    """gate (F, D), up (F, D), down (D, F) of one gated feed-forward network; None for others."""
    for names in NAMES:
        parts = [getattr(module, name, None) for name in names]
        if all(isinstance(part, nn.Linear) for part in parts):
            gate, up, down = (part.weight for part in parts)  # type: ignore[union-attr]
            # w1, w2, w3 stand in another order elsewhere, which square ones would not show.
            told = names == NAMES[0] or len(down) != len(gate)
            return (gate, up, down) if told and gate.shape == up.shape == down.T.shape else None
    for joint, last in JOINT:
        both, down = getattr(module, joint, None), getattr(module, last, None)
        if isinstance(both, nn.Linear) and isinstance(down, nn.Linear):
            gate, up = both.weight.chunk(2)
            fits = gate.shape == up.shape == down.weight.T.shape
            return (gate, up, down.weight) if fits else None
    return None


def shared_weights(block: nn.Module, routed: Sequence[nn.Module]) -> Weights | None:
    """Those of what stands beside the router and experts and computes on every token."""
    for part in block.children():
        if part not in routed and (found := mlp_weights(part)):
            return found
    return None
