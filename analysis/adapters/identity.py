"""What a model in memory is, as one number: it follows all that decides what it computes."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.form import is_library
from analysis.adapters.pretrained import transformers_version

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
    its configuration and which of its implementations it uses."""
    digest = hashlib.sha256(tensors_sha256(model).encode())
    for name, part in model.named_modules():
        kind = type(part).__qualname__
        digest.update(repr((name, kind)).encode())
        if not kind.endswith(CACHES):
            own = (item for item in vars(part).items() if item[0] not in OF_TORCH)
            plain = [(key, value) for key, value in own if isinstance(value, PLAIN)]
            digest.update(repr(sorted(plain, key=str)).encode())
            for key, buffer in part.named_buffers(recurse=False):
                _add(digest, f"{name}.{key}", buffer)
    kinds = {type(part) for part in model.modules()}
    own_kinds = [kind for kind in kinds if not f"{kind.__module__}.".startswith(LIBRARIES)]
    digest.update("\n".join(sorted(map(_code, own_kinds))).encode())
    if is_library(model):
        config: Any = model.config
        parts = (f"_{part}_implementation" for part in ("experts", "attn"))
        how = [transformers_version(), *(str(getattr(config, part, "")) for part in parts)]
        digest.update("\n".join([*how, config.to_json_string(use_diff=False)]).encode())
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
    digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())


def _code(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # written where no file is
        return kind.__qualname__
