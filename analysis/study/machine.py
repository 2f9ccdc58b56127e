"""How many processes a study may have on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from analysis.study.specs import ModelSpec
from cartmoe.checkpoint import read_config
from cartmoe.skeleton import skeleton

PROCESS = 2**30  # bytes of one with its libraries and activations
PARAMETER = 20  # bytes: its weight, its gradient, two moments, and a copy that is written
CGROUP = Path("/sys/fs/cgroup")  # of a container


def free_workers(models: Iterable[ModelSpec]) -> int:
    """As many as there are cores, and memory for the largest of the models in each."""
    fitting = free_memory() // (PROCESS + PARAMETER * max(map(_parameters, models)))
    return max(1, min(cores(), fitting))


def _parameters(spec: ModelSpec) -> int:
    try:
        config = read_config(spec.path) if spec.path else spec.config
    except (OSError, ValueError):  # which planning tells, with all other mistakes
        return 0
    return skeleton(config).num_parameters()


def cores() -> int:
    """Those that this process may use, going by its affinity and its container."""
    affinity = getattr(os, "sched_getaffinity", None)  # which macOS lacks
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or "max"
        return count


def free_memory() -> int:
    """Bytes that may be used without swapping; half of all where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]
        free = 1024 * int(kibibytes)
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, limit - used)
    except (OSError, ValueError):
        return free
