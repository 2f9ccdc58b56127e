"""Ratios of times: medians of interleaved runs in one process."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from cartmoe.config import ModelConfig
from cartmoe.precision import probe_precision


class Row(NamedTuple):
    """One line of the bench table."""

    what: str
    ratio: float
    goal: str
    detail: str = ""


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int = 15, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a slow spell hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@functools.cache
def has_bf16() -> bool:
    """Whether products in bf16 are not slower here than in fp32. On a CPU without instructions for
    them they may be forty times slower, and whoever waits for that learns nothing."""
    config = ModelConfig.preset("nano")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    took = probe_precision(config, 2048, device)["milliseconds"]
    return took["bf16"] <= took["fp32"]


def precisions() -> list[str]:
    """Those that are worth measuring here."""
    return ["fp32", "bf16"] if has_bf16() else ["fp32"]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(times: Mapping[str, float]) -> str:
    """ "a 12.3 ms, b 4.5 ms"."""
    return ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items())
