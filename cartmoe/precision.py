"""Which precision matrix products are faster in, on this machine and for this model's shapes."""

from __future__ import annotations

import time
from typing import Any

import torch

from cartmoe.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Limits of a probed product: a CPU without bf16 instructions can be 40 times slower in bf16.
MAX_ROWS, MIN_ROWS, MAX_WORK = 2048, 64, 2**29  # work: multiplications
CASTS = 1.25  # bf16 must win by this factor, since weights and activations are cast at every step


def probe_precision(config: ModelConfig, num_tokens: int, device: str) -> dict[str, Any]:
    """Time the model's matrix products in both precisions; about a second.

    num_tokens   of one forward

    Returns {"precision": "fp32" or "bf16", "milliseconds": {"fp32": ..., "bf16": ...}}. The answer
    may differ from one time to the next, so a run keeps its first.
    """
    D, F, V = config.d_model, config.ffn_width, config.vocab_size
    rows = min(num_tokens, MAX_ROWS, max(MIN_ROWS, MAX_WORK // (D * max(2 * F, V))))
    products = [(rows, D, 3 * D), (rows, D, 2 * F), (rows, F, D), (rows, D, V)]
    if any(config.is_moe(layer) for layer in range(config.num_layers)):
        rows_of_expert = max(1, rows * max(config.top_k) // config.num_experts)
        width = config.expert_width
        products += [(rows_of_expert, D, 2 * width), (rows_of_expert, width, D)] * 2
    operands = {
        name: [
            (
                torch.ones(n, k, dtype=dtype, device=device),
                torch.ones(k, m, dtype=dtype, device=device),
            )
            for n, k, m in products
        ]
        for name, dtype in DTYPES.items()
    }
    seconds = dict.fromkeys(DTYPES, float("inf"))
    for _ in range(4):  # the best of them: the first one warms up
        for name, pairs in operands.items():
            _wait(device)
            start = time.perf_counter()
            for a, b in pairs:
                a @ b
            _wait(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    precision = "bf16" if CASTS * seconds["bf16"] < seconds["fp32"] else "fp32"
    milliseconds = {name: round(1000 * value, 3) for name, value in seconds.items()}
    return {"precision": precision, "milliseconds": milliseconds}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
