"""How many processes a study may have on this machine."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from analysis.adapters import shape_of, weight_files
from analysis.study.provenance import default_device
from analysis.study.specs import ModelSpec
from cartmoe.checkpoint import read_config
from cartmoe.skeleton import skeleton

PROCESS = 2**30  # bytes of one with its libraries and activations
PARAMETER = 20  # bytes: its weight, its gradient, two moments, and a copy that is written
CGROUP = Path("/sys/fs/cgroup")  # of a container


def free_workers(models: Iterable[ModelSpec], threads: int = 1) -> int:
    """As many as there are cores for, of so many threads each, and memory for the largest of the
    models in each; one on a GPU."""
    models = list(models)
    if default_device() != "cpu" or any(map(is_streamed, models)):  # each would read all layers
        return 1
    fitting = free_memory() // (PROCESS + PARAMETER * max(map(_parameters, models)))
    return max(1, min(cores() // threads, fitting))


def is_streamed(spec: ModelSpec) -> bool:
    """Whether its weights stay on the disk, as the study says, or as there is room for them."""
    if spec.stream is not None:
        return spec.stream
    if spec.absent:
        return shape_of(spec.published or {}).stored > room() / 2
    if spec.hf is None:
        return False
    return sum(path.stat().st_size for path in weight_files(Path(spec.hf))) > room() / 2


def threads_for(spec: ModelSpec, chosen: int | None) -> int:
    """Of who measures the model: those that somebody chose, or one, and all cores where one process
    has a model that is larger than memory for itself."""
    return chosen or (cores() if is_streamed(spec) else 1)


def room() -> int:
    """Bytes of memory where studies measure, used or not: what is decided by it stays decided."""
    if default_device() != "cpu":
        return torch.cuda.mem_get_info()[1]
    sysconf = getattr(os, "sysconf", lambda name: sys.maxsize)  # Windows has none
    whole = sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return whole


def _parameters(spec: ModelSpec) -> int:
    if spec.absent:  # which planning tells
        return 0
    if spec.hf:  # as it is stored; a process computes with it and keeps no gradient
        return sum(path.stat().st_size for path in weight_files(Path(spec.hf))) // (PARAMETER // 2)
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
    """Bytes that may be used without swapping; half of all where the system does not say, and no
    bound where it does not even know how much there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]
        free = 1024 * int(kibibytes)
    except (OSError, KeyError):
        sysconf = getattr(os, "sysconf", lambda name: sys.maxsize)  # Windows has none
        free = sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # Files that were read are counted as used, and go when their room is needed.
        return min(free, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return free
