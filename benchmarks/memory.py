"""Peak memory of a training step, measured as the peak resident size of a fresh process.

`python -m benchmarks.memory NAME` prints the bytes above what the process had after importing
torch and one small matmul.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.steps import dense_twin, training_step
from benchmarks.timing import Row, precisions
from cartmoe.config import ModelConfig
from cartmoe.model import LanguageModel

STATE = 4 * 4  # bytes a parameter: itself, its gradient, two moments, all fp32


def resident(field: str) -> int:
    """Bytes that the kernel says of this process: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text()
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def _build(name: str) -> LanguageModel:
    config = ModelConfig.preset("nano", "cartesian")
    return dense_twin(config) if name == "twin" else LanguageModel(config)


def peak(name: str, bf16: bool) -> int:
    """Bytes of a process that trains the model a few steps, above an idle one's."""
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident("VmRSS")
    run = training_step(_build(name), bf16)
    for _ in range(3):
        run()
    return resident("VmHWM") - before


def rows():
    """Rows of the bench table."""
    for precision in precisions():
        peaks = {}
        for name in ("cartesian", "twin"):
            command = [sys.executable, "-m", "benchmarks.memory", name, precision]
            peaks[name] = int(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout
            )
        with torch.device("meta"):
            sizes = {name: _build(name).num_parameters() for name in peaks}
        activations = peaks["twin"] - STATE * sizes["twin"]
        least = STATE * sizes["cartesian"] + activations
        detail = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in peaks.items())
        what = f"peak memory of a training step / state + twin's activations, {precision}"
        yield Row(what, peaks["cartesian"] / least, "<= 1.30", detail)


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2] == "bf16"))
