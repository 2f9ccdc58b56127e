"""Which directories hold models of the transformers library, and the tokenizers beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cartmoe.foreign import read_text
from cartmoe.tokenizers import JsonTokenizer, Tokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
STARTS = ("bos_token", "cls_token", "eos_token")  # what may start a text, the best first


def is_pretrained(folder: Path) -> bool:
    """Whether the directory has a config.json that names a family of the transformers library."""
    return "model_type" in _json(folder / CONFIG)


def tokenizer_in(folder: Path) -> JsonTokenizer:
    """The model's own, from its tokenizer.json; documents begin with the token that the directory
    names for that, or, where it names none, with the one that ends a text.

    Raises `ValueError` where there is none.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise ValueError(f"{folder} has no {TOKENIZER}; give a tokenizer")
    return JsonTokenizer(read_text(path), folder.name, starts=[*_starts(folder)])


def _starts(folder: Path) -> Iterator[str]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = _json(folder / name)
        for key in STARTS:
            token = said.get(key)
            yield from filter(None, [token.get("content") if isinstance(token, dict) else token])


def as_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """One of the transformers library, as documents need it; others as they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    starts = [token for key in STARTS if (token := getattr(tokenizer, key, None))]
    return JsonTokenizer(backend.to_str(), type(tokenizer).__name__, starts=starts)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which whoever reads it tells
        return {}
    return found if isinstance(found, dict) else {}
