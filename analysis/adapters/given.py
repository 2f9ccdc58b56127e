"""What tokens a forward of a pretrained model is given: padding and a cache taken into account.

Shapes: B rows, L tokens of a row in this forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from analysis.adapters.base import Given
from analysis.adapters.form import is_library


def given_to(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Given:
    """Of a call with these arguments. Raises `ValueError` for embeddings in the place of tokens,
    and for a mask from which padding cannot be told."""
    named = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    named = {**named, **named.pop("kwargs", {})}
    tokens_BL = named.get("input_ids", next(iter(named.values()), None))
    if not isinstance(tokens_BL, Tensor) or tokens_BL.ndim != 2 or tokens_BL.is_floating_point():
        raise ValueError(
            "the model is given no input_ids; conditions and noise go by tokens, not by embeddings"
        )
    cache, mask = named.get("past_key_values"), named.get("attention_mask")
    B, L = tokens_BL.shape
    past = _length(cache, mask, L)
    real = _real(mask, (B, past + L), past)
    if real is None:
        position_BL = past + Given.whole(tokens_BL).position_BL
        surely_BL = _before_padding(model, tokens_BL)
        return Given(tokens_BL, position_BL, None, past, surely_BL, cache)
    position_BL = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
    real_BL = real[:, past:]
    return Given(tokens_BL, position_BL, None if real_BL.all() else real_BL, past, None, cache)


def _length(cache: Any, mask: Any, new: int) -> int:
    """Tokens a row that a cache holds; one without attention knows of none, but a mask does."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask.shape[1] - new
        raise ValueError(
            "how many tokens the cache holds cannot be told; give an attention_mask over all"
        ) from None


def _real(mask: Any, size: tuple[int, int], past: int) -> Tensor | None:
    """(B, past + L) which tokens are no padding; None where all are, as far as is said.

    A mask of queries by keys, as `generate` makes for a static cache, may leave out padding alone.
    """
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", mask)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= size[1]:
        return mask[:, : size[1]].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= size[1]:
        seen_BLS = mask[:, 0, :, : size[1]]
        seen_BLS = seen_BLS if seen_BLS.dtype == torch.bool else seen_BLS == 0
        real = seen_BLS[:, -1].expand(size)
        at_L = torch.arange(past, size[1], device=mask.device)
        causal_LS = torch.arange(size[1], device=mask.device) <= at_L[:, None]
        wanted_BLS = real[:, None] & causal_LS
        seen_BLS, rows_BL = seen_BLS.expand_as(wanted_BLS), real[:, past:]
        of_padding = seen_BLS[~rows_BL]  # which sees nothing, or all; another text sees itself
        alike = torch.equal(seen_BLS[rows_BL], wanted_BLS[rows_BL])
        if alike and (of_padding == of_padding[:, :1]).all():
            return real
    kind = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(
        f"attention_mask is {kind}, from which padding cannot be told; give one of {size}, the "
        "cache's tokens and the new ones, 0 at padding"
    )


def _before_padding(model: Any, tokens_BL: Tensor) -> Tensor:
    """(B, L) what stands before the last token that is surely none: lm-eval puts zeros behind a
    text, without a mask. They do no harm there, where no token sees them, but the text should not
    be another one for them."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", 0) if is_library(model) else 0
    text_BL = (tokens_BL != 0) & (tokens_BL != (pad or 0))
    return text_BL.flip(1).cumsum(1).flip(1) > 0
