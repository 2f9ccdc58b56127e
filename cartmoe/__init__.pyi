from .checkpoint import load, save
from .config import FAMILIES, PRESETS, ModelConfig
from .model import LanguageModel
from .routing import Router, Routing

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
