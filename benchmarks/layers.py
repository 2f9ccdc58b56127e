"""One layer, forward and backward: routed experts against dense, and against a one-hot loop.

Shapes: T 4096, d 256, expert width F 512. The dense twin is one SwiGLU of width K F.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import Row, interleaved, milliseconds, precisions
from cartmoe.config import ModelConfig
from cartmoe.ffn import DenseFFN, MoELayer, RoutedStage
from cartmoe.precision import DTYPES

T, D, WIDTH = 4096, 256, 512
Module = TypeVar("Module", bound=nn.Module)
GOALS = {(torch.float32, 16): "1.10", (torch.float32, 64): "1.25",
         (torch.bfloat16, 16): "1.40", (torch.bfloat16, 64): "2.00"}  # fmt: skip


def rows(device: str = "cpu"):
    """Rows of the bench table."""
    dtypes = [DTYPES[name] for name in precisions()]
    for (dtype, num_experts), goal in GOALS.items():
        if dtype not in dtypes:
            continue
        top_k = {16: 2, 64: 4}[num_experts]
        stage = _stage(num_experts, top_k).to(device)
        runs = {
            "moe": _step(lambda x, stage=stage: stage(x, None)[0], stage, dtype, device),
            "dense": _dense(top_k * WIDTH, dtype, device),
        }
        if num_experts == 64:
            runs["one-hot"] = _step(lambda x, stage=stage: one_hot(stage, x), stage, dtype, device)
        times = interleaved(runs)
        name = f"{str(dtype)[6:]} E {num_experts}"
        ratio = times["moe"] / times["dense"]
        yield Row(f"MoE layer / dense twin, {name}", ratio, f"<= {goal}", milliseconds(times))
        if num_experts == 64:
            ratio = times["one-hot"] / times["moe"]
            yield Row(f"one-hot loop / MoE layer, {name}", ratio, ">= 5")
    for dtype in dtypes:
        runs = {}
        for family in ("cartesian", "fine_grained"):
            config = ModelConfig(family, 256, D, 2 * WIDTH, 1, 4)
            layer = _initialized(MoELayer(config)).to(device)
            (*steps,) = layer.steps()
            runs[family] = _step(lambda x, steps=steps: _chain(steps, x), layer, dtype, device)
        times = interleaved(runs)
        ratio = times["cartesian"] / times["fine_grained"]
        name = f"cartesian / fine_grained layer, {str(dtype)[6:]}"
        yield Row(name, ratio, "<= 1.20", milliseconds(times))


def _chain(steps, x):
    for step in steps:
        x, _ = step(x, None)
    return x


def _stage(num_experts: int, top_k: int) -> RoutedStage:
    config = ModelConfig("smoe", 256, D, WIDTH, 1, 4, num_experts=num_experts, top_k=(top_k,))
    return _initialized(RoutedStage(config, 0, None))


def _dense(width: int, dtype: torch.dtype, device: str):
    ffn = _initialized(DenseFFN(D, width)).to(device)
    return _step(ffn, ffn, dtype, device)


def _initialized(module: Module) -> Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


def _step(function, module: nn.Module, dtype: torch.dtype, device: str):
    """forward + backward under autocast (bf16) or without, gradients dropped."""
    torch.manual_seed(0)
    x = torch.randn(T, D, device=device, requires_grad=True)
    grad = torch.randn(T, D, device=device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(x)
        y.backward(grad.to(y.dtype))
        x.grad = None
        module.zero_grad(set_to_none=True)

    return run


def one_hot(stage: RoutedStage, x_TD):
    """The textbook loop: for each expert torch.where on the one-hot mask, its FFN, index_add."""
    routing = stage.router(x_TD, None)
    mask_ETK = F.one_hot(routing.ids_TK, stage.experts.num_experts).permute(2, 0, 1)
    y_TD = torch.zeros_like(x_TD)
    weights = zip(stage.experts.gate_up_ECD, stage.experts.down_EDF, strict=True)
    for mask_TK, (gate_up, down) in zip(mask_ETK, weights, strict=True):
        token, slot = torch.where(mask_TK)
        gate, up = F.linear(x_TD[token], gate_up).chunk(2, -1)
        out = F.linear(F.silu(gate) * up, down) * routing.weights_TK[token, slot, None]
        y_TD = y_TD.index_add(0, token, out.to(y_TD.dtype))
    return y_TD
