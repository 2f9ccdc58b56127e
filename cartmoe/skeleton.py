"""A model without weights: what can be told of it, or filled from a file."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from cartmoe.config import ModelConfig
from cartmoe.model import LanguageModel


class _DrawNothing(TorchFunctionMode):
    """Skips `torch.nn.init`: to draw nothing on the meta device, torch imports its compiler, which
    takes more than a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def skeleton(config: ModelConfig) -> LanguageModel:
    """The model on the meta device. Its tensors have shapes and no values; nothing is drawn."""
    with torch.device("meta"), _DrawNothing():
        return LanguageModel(config)
