"""What kind of text a token is, for conditions that act on some kinds alone."""

from __future__ import annotations

import unicodedata
from typing import Any

import torch
from torch import Tensor

# In the order of their numbers. A token's kind is that of its first character that is no space.
KINDS = ("letter", "digit", "punctuation", "space", "other")
_OF_CATEGORY = {"L": "letter", "M": "letter", "N": "digit", "P": "punctuation", "S": "punctuation"}


def kind_of(text: str) -> str:
    """The kind of one token's text; "other" for none, and for parts of a character."""
    visible = text.strip()
    if not visible:
        return "space" if text else "other"
    if visible[0] == "\N{REPLACEMENT CHARACTER}":
        return "other"
    return _OF_CATEGORY.get(unicodedata.category(visible[0])[0], "other")


def token_kinds(tokenizer: Any) -> Tensor:
    """(V,) int64: by token id, the number of its kind in `KINDS`."""
    texts = (tokenizer.decode([id]) for id in range(tokenizer.vocab_size))
    return torch.tensor([KINDS.index(kind_of(text)) for text in texts])
