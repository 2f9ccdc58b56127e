"""How a model is called on tokens, and what of its result is what: one of the transformers library,
or a module of one's own that makes logits of token ids.

Shapes: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.seams import stream_of


def is_library(model: Any) -> bool:
    """Whether it is a module of the transformers library."""
    return hasattr(getattr(model, "config", None), "get_text_config")


def call(module: nn.Module, tokens_BL: Tensor) -> Any:
    """What the model, or its body, makes of whole sequences."""
    if is_library(module):
        return module(input_ids=tokens_BL, use_cache=False)
    return module(tokens_BL)


def hidden_of(result: Any) -> Tensor:
    """(B, L, D) of what a body returned."""
    return result.last_hidden_state if hasattr(result, "last_hidden_state") else stream_of(result)


def with_hidden(result: Any, hidden_BLD: Tensor) -> Any:
    """Such a result with these hidden states."""
    if hasattr(result, "last_hidden_state"):
        return type(result)(last_hidden_state=hidden_BLD)
    return (hidden_BLD, *result[1:]) if isinstance(result, tuple) else hidden_BLD


def vocab_size_of(model: nn.Module) -> int:
    """That of the table of embeddings that is given token ids. Raises `ValueError` where there is
    none."""
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    tokens_BL, found = torch.zeros(1, 2, dtype=torch.int64), []  # positions would differ

    def note(table: nn.Embedding, args: tuple) -> None:
        if isinstance(args[0], Tensor) and args[0].shape == (1, 2) and not args[0].any():
            found.append(table.num_embeddings)

    hooks = [table.register_forward_pre_hook(note) for table in tables]
    try:
        if tables:
            model(tokens_BL.to(tables[0].weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no table of embeddings for token ids")
    return found[0]


def logits_of(result: Any) -> Tensor:
    """(B, L, V) of what the model returned. Raises `ValueError` for anything else."""
    if isinstance(result, Mapping) and "logits" in result:
        found = result["logits"]
    elif hasattr(result, "logits"):
        found = result.logits
    else:
        found = result[0] if isinstance(result, tuple) and result else result
    if not isinstance(found, Tensor) or found.ndim != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"the model gives {shape} for token ids (B, L); a causal language model gives logits "
            "(B, L, V), of every token"
        )
    return found
