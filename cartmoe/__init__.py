"""CartesianMoE (arXiv 2410.16077) and its baselines; knows nothing of who observes it."""

import os

# Before torch loads OpenMP: its threads spin while they wait, by default for so long that a busy
# neighbor on the machine makes training ten times slower. So short a spin makes that four times,
# and costs a few percent where there is none (benchmarks/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from cartmoe.checkpoint import load, save
from cartmoe.config import FAMILIES, PRESETS, ModelConfig
from cartmoe.model import LanguageModel
from cartmoe.routing import Router, Routing
from cartmoe.shadow import warn_if_shadowed

warn_if_shadowed()

__all__ = [
    "FAMILIES",
    "PRESETS",
    "LanguageModel",
    "ModelConfig",
    "Router",
    "Routing",
    "load",
    "save",
]
