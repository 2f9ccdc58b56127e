"""What a model costs: parameters, FLOPs a token, memory. Counted on a model without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cartmoe.config import ModelConfig
from cartmoe.ffn import RoutedStage
from cartmoe.model import LanguageModel


@dataclass(frozen=True)
class Part:
    """One part of a model. `active` are the parameters that one token uses; `flops` the floating
    point operations of a token's forward, two for each multiplication and addition."""

    name: str
    kind: str
    parameters: int
    active: int
    flops: int


def parts_of(config: ModelConfig, length: int) -> list[Part]:
    """The parts in order of depth. With top-p routing a token counts as using `top_k` experts.

    length   of a sequence: causal attention compares a token with (length + 1) / 2 on average

    FLOPs are those of matrix products; norms, activations and the softmax are left out.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    D, V = config.d_model, config.vocab_size
    parts = [Part("embed", "lookup", V * D, V * D, 0)]
    for layer, block in enumerate(model.trunk.blocks):
        own = _count(block.norm) + _count(block.attention)
        matrices = sum(p.numel() for p in block.attention.parameters())
        attention = 2 * matrices + 2 * D * (length + 1)
        parts.append(Part(f"layer {layer}", "attention", own, own, attention))
        parts.append(_ffn(config, layer, block.ffn))
    parts.append(Part("norm", "RMSNorm", D, D, 0))
    parts.append(Part("head", "linear", V * D, V * D, 2 * V * D))
    return parts


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _ffn(config: ModelConfig, layer: int, ffn: nn.Module) -> Part:
    total = active = _count(ffn)
    stages = [m for m in ffn.modules() if isinstance(m, RoutedStage)]
    kind = f"dense {config.ffn_width}"
    if stages:
        E, width = config.num_experts, config.expert_width
        chosen = "top-" + " + ".join(map(str, dict.fromkeys(config.top_k)))
        if config.top_p:
            chosen = f"top-p {config.top_p}"
        kind = f"{E} experts of {width}, {chosen}"
        if len(stages) > 1:
            kind = f"{len(stages)} x ({kind}), {config.composition}"
    for stage in stages:
        unchosen = E - stage.router.top_k
        active -= unchosen * _count(stage.experts) // E
    # All but norms and biases are matrices; a token uses each entry of its own once.
    vectors = sum(p.numel() for p in ffn.parameters() if p.dim() == 1)
    return Part(f"layer {layer}", kind, total, active, 2 * (active - vectors))


def describe(config: ModelConfig, length: int = 256) -> str:
    """A text of totals and a table of the parts."""
    parts = parts_of(config, length)
    total, active = (sum(getattr(p, field) for p in parts) for field in ("parameters", "active"))
    flops = sum(p.flops for p in parts)
    fields = [
        ("family", config.family),
        ("parameters", f"{total:,} total, {active:,} active"),
        ("FLOPs/token", f"{flops:,} forward, {3 * flops:,} training (length {length})"),
        ("weights", f"{_size(4 * total)} in fp32, {_size(2 * total)} in bf16"),
        ("training", f"{_size(16 * total)}: fp32 weights, gradients and AdamW's two moments"),
    ]
    rows = [("part", "kind", "parameters", "active", "FLOPs/token")]
    rows += [(p.name, p.kind, f"{p.parameters:,}", f"{p.active:,}", f"{p.flops:,}") for p in parts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:<12} {value}" for name, value in fields] + [""]
    for name, kind, *numbers in rows:
        cells = [f"{n:>{w}}" for n, w in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join([f"{name:<{widths[0]}}", f"{kind:<{widths[1]}}", *cells]))
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        num_bytes /= 1024
    raise AssertionError
