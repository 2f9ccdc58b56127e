"""What tokens a forward of a pretrained model is given: padding and a cache taken into account.

Shapes: B rows, L tokens of a row in this forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from analysis.adapters.base import Given
from analysis.adapters.form import is_library


def given_to(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Given:
    """Of a call with these arguments. Raises `ValueError` for embeddings in the place of tokens."""
    tokens_BL = args[0] if args else kwargs.get("input_ids")
    if tokens_BL is None:
        raise ValueError(
            "the model is given no input_ids; conditions and noise go by tokens, not by embeddings"
        )
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    L = tokens_BL.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        known = mask[:, : past + L].bool()
        position_BL = (known.cumsum(1) - 1).clamp(min=0)[:, past:]
        real_BL = known[:, past:]
        return Given(tokens_BL, position_BL, None if real_BL.all() else real_BL, past)
    position_BL = past + Given.whole(tokens_BL).position_BL
    return Given(tokens_BL, position_BL, None, past, _before_padding(model, tokens_BL))


def _before_padding(model: Any, tokens_BL: Tensor) -> Tensor:
    """(B, L) what stands before the last token that is surely none: lm-eval puts zeros behind a
    text, without a mask. They do no harm there, where no token sees them, but the text should not
    be another one for them."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", 0) if is_library(model) else 0
    text_BL = (tokens_BL != 0) & (tokens_BL != (pad or 0))
    return text_BL.flip(1).cumsum(1).flip(1) > 0
