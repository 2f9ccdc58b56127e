"""python -m benchmarks: every speed ratio beside its goal."""

import torch
from tqdm.auto import tqdm

from benchmarks import (
    explorer,
    layers,
    memory,
    overlap,
    overlap_function,
    pretrained,
    steps,
    streamed,
    studies,
    sweeps,
    tasks,
)
from benchmarks.timing import has_bf16

capability = torch.backends.cpu.get_cpu_capability()
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}\n")
if not has_bf16():
    print("bf16 is slower than fp32 here: its rows are left out\n")
print(f"{'what':<75} {'ratio':>7}  goal")
parts = (
    layers,
    steps,
    memory,
    sweeps,
    pretrained,
    overlap,
    overlap_function,
    tasks,
    streamed,
    explorer,
    studies,
)
for part in parts:
    for row in part.rows():
        tqdm.write(f"{row.what:<75} {row.ratio:>7.3f}  {row.goal:<8} {row.detail}")
