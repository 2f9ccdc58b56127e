"""How a model is called on tokens, and what of its result is what: one of the transformers library,
or a module of one's own that makes logits of token ids.

Shapes: B batch, L length, D model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

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
    """That of the first table of embeddings. Raises `ValueError` where there is none."""
    tables = (part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))
    if (size := next(tables, None)) is None:
        raise ValueError(f"{type(model).__name__} has no table of embeddings for token ids")
    return size


def logits_of(result: Any) -> Tensor:
    """(B, L, V) of what the model returned."""
    return result.logits if hasattr(result, "logits") else stream_of(result)
