"""A model that is read a layer at a time, beside the same one loaded whole.

The model is an OLMoE of the transformers library with random weights, 2 GB in 16 layers, written
as such models are published. `python -m benchmarks.streamed whole|streamed DIR` prints the peak
memory of a process that loads it and measures, above that after the imports, and the seconds of
measuring.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.utils import logging

import analysis as an
from analysis.perturb import condition_from_text
from benchmarks.memory import resident
from benchmarks.pretrained import olmoe, shard
from benchmarks.timing import Row
from cartmoe.tokenizers import ByteTokenizer

SHAPE: dict[str, Any] = dict(
    hidden_size=1024, intermediate_size=512, num_experts=20, num_key_value_heads=8
)
TEXTS = "DropTop(1)", "GaussianNoise(1.0)", "DropTop(1), layer 8"
CONDITIONS = [condition_from_text(text) for text in TEXTS]
WAYS = ("whole", "streamed")


def rows() -> Iterator[Row]:
    """Peak memory and time of a sweep, in turns, each in a process of its own."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model")
        for _ in range(3):
            for way in WAYS:
                command = [sys.executable, "-m", "benchmarks.streamed", way, f"{folder}/model"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                peak, seconds = map(float, done.stdout.split()[-2:])
                found[way].append((peak, seconds))
    for what, i, unit, goal in (
        ("peak memory, a layer at a time / loaded whole, 2 GB in 16 layers", 0, 2**20, "<= 0.25"),
        ("a sweep a layer at a time / of the model in memory", 1, 1, "<= 1.25"),
    ):
        of = {way: median(run[i] for run in found[way]) / unit for way in WAYS}
        detail = ", ".join(f"{way} {of[way]:.1f}" for way in WAYS) + (" s" if i else " MiB")
        yield Row(what, of["streamed"] / of["whole"], goal, detail)


def write(folder: Path) -> None:
    """The model as it would be published, one tensor an expert."""
    logging.disable_progress_bar()
    olmoe(**SHAPE).save_pretrained(folder)


def measured(way: str, folder: str) -> tuple[int, float]:
    """Peak bytes above those after the imports, and seconds of the sweep."""
    logging.disable_progress_bar()
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    model = an.load(folder, tokenizer=ByteTokenizer(), stream=way == "streamed")
    start = time.perf_counter()
    how: dict[str, Any] = dict(controls=False, progress=False, batch_size=1)
    an.sweep(model, shard(), CONDITIONS, **how)
    return resident("VmHWM") - before, time.perf_counter() - start


if __name__ == "__main__":
    print(*measured(*sys.argv[1:]))
