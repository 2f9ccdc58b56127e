"""CartesianMoE (arXiv 2410.16077) and its baselines; knows nothing of who observes it."""

from cartmoe.checkpoint import load, save
from cartmoe.config import FAMILIES, PRESETS, ModelConfig
from cartmoe.model import LanguageModel
from cartmoe.routing import Router, Routing

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
