"""Everything that can change a bit of a cell, and what a manifest says of a run."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# The source files that compute a cell (folders: all in them); a change of any is another cell.
COMPUTES = (
    *(f"cartmoe/{name}" for name in ("config", "routing", "experts", "ffn", "losses", "model")),
    *("cartmoe/hf", "cartmoe/hooks", "cartmoe/tokenizers", "analysis/adapters", "analysis/perturb"),
    *(f"analysis/measure/{name}" for name in ("clean", "losses", "doses", "calibrate", "rows")),
    *(
        f"analysis/measure/{name}"
        for name in (
            *("intervene", "prepare", "search", "shard", "by_segment", "batch", "bookmarks"),
            *("arm", "collector", "reuse", "cached"),
        )
    ),
    "analysis/study/worker",
)
ROOT = Path(__file__).parents[2]  # where the packages are


@functools.cache
def source_sha256(names: tuple[str, ...] = COMPUTES) -> str:
    """Of these files, by default those that compute a cell."""
    digest = hashlib.sha256()
    for name in names:
        place = ROOT / name
        for path in sorted(place.glob("*.py")) or [place.with_suffix(".py")]:
            digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def default_device() -> str:
    """Where studies measure: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def platform_identity(device: str, threads: int | None = None) -> dict[str, Any]:
    """What of the machine and its libraries changes last bits.

    threads   that a process will compute with; None: as many as now
    """
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": None if on_gpu else threads or torch.get_num_threads(),
        "cpu_capability": None if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "source": source_sha256(),
    }


def manifest() -> dict[str, Any]:
    """Versions, git commit and hardware of this run."""
    packages = ("torch", "numpy", "pandas", "scipy", "matplotlib")
    return {
        "python": sys.version.split()[0],
        "versions": {name: version(name) for name in packages},
        "git_commit": _git_commit(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "platform": platform_identity(default_device()),
    }


def _git_commit() -> str | None:
    """Of the checkout that the package lies in, "-dirty" appended if it was changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
