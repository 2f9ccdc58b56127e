"""CartesianMoE (arXiv 2410.16077) and its baselines; knows nothing of who observes it."""

import os

# Before torch loads OpenMP: threads that spin while they wait make two busy processes on one
# machine eight times slower than two that sleep; alone, the difference is small.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
