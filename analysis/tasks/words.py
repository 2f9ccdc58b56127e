"""Texts of tasks as tokens: what they name of special tokens, what starts and what ends one."""

from __future__ import annotations

from typing import Any

from analysis.adapters import Adapter
from cartmoe.tokenizers import JsonTokenizer


class Words:
    """A model's tokenizer as tasks use it.

    start   ids before a text, by the tokenizer's own habit: of the tokenizers library the token
            that starts a document, if its file says so; of others always
    ends    ids that end a text: those of the model's configurations, and the one that starts the
            next document

    Unlike in documents, a text that names a special token has it: prompts are made of such names.
    """

    def __init__(self, model: Adapter):
        self.tokenizer: Any = model.tokenizer
        self.library: Any = None
        if isinstance(self.tokenizer, JsonTokenizer):
            from tokenizers import Tokenizer  # of an extra

            self.library = Tokenizer.from_str(self.tokenizer.json)
            self.library.no_truncation()
            self.library.no_padding()
        bos = self.tokenizer.bos_id
        self.start = [bos] if self.library is None or bos in self.library.encode("").ids else []
        self.ends = {bos, *_ends_of(model.module)}

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Ids of the text, and before them what starts one, unless it says so itself."""
        if self.library is None:
            ids = self.tokenizer.encode(text).tolist()
        else:
            ids = self.library.encode(text, add_special_tokens=False).ids
        return ids if not start or ids[:1] == self.start else [*self.start, *ids]

    def decode(self, ids: list[int]) -> str:
        """Without special tokens."""
        return self.tokenizer.decode(ids)

    def token(self, text: str) -> int | None:
        """The id of a text that is one token."""
        return None if self.library is None else self.library.token_to_id(text)


def text_config(module: Any) -> Any:
    """The part of a configuration of the transformers library that is of its language model; what
    other models have, as it is."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _ends_of(module: Any) -> set[int]:
    found: set[int] = set()
    for config in (text_config(module), getattr(module, "generation_config", None)):
        said = getattr(config, "eos_token_id", None)
        found.update(said if isinstance(said, list) else [] if said is None else [said])
    return found
