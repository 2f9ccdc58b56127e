"""What a model in memory is, as one number: it follows all that decides what it computes."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

OF_TORCH = frozenset(vars(nn.Module()))  # attributes that every module has
PLAIN = (bool, int, float, str, type(None))
LIBRARIES = ("torch.", "transformers.")  # whose code their version stands for
CACHES = "RotaryEmbedding"  # of what ends so, attributes and buffers depend on what was run


def tensors_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers that are saved."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        _add(digest, name, tensor)
    return digest.hexdigest()


def module_sha256(model: nn.Module) -> str:
    """SHA-256 over all tensors; of every module its class and plain attributes (a router's top_k is
    one); the code of classes that are of no library; of a model of the transformers library that,
    its configuration and its implementations."""
    digest = hashlib.sha256(tensors_sha256(model).encode())
    for name, part in model.named_modules():
        kind = type(part)
        digest.update(repr((name, kind.__qualname__)).encode())
        if not kind.__name__.endswith(CACHES):
            plain = {k: v for k, v in vars(part).items() if isinstance(v, PLAIN)}
            digest.update(repr(sorted(plain.keys() - OF_TORCH)).encode())
            digest.update(repr([plain[k] for k in sorted(plain.keys() - OF_TORCH)]).encode())
            for key, buffer in part.named_buffers(recurse=False):
                _add(digest, f"{name}.{key}", buffer)
    for kind in sorted(
        {type(part) for part in model.modules()}, key=lambda kind: kind.__qualname__
    ):
        if not f"{kind.__module__}.".startswith(LIBRARIES):
            digest.update(_code(kind).encode())
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())


def _code(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written where no file is
        return kind.__qualname__
