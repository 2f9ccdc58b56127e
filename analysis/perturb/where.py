"""Where a condition acts: at which sites, on which of their tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.adapters import Adapter
from analysis.perturb.context import Tokens
from cartmoe.config import check_choice, check_whole
from cartmoe.hooks import RouterSite

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


def token_kinds(model: Adapter, places: Iterable[Where]) -> Tensor | None:
    """(V,) int64: by token id, the number of its kind in `KINDS`; None where no place asks for
    kinds, or the model has no tokenizer."""
    tokenizer = model.tokenizer
    if tokenizer is None or not any(place.tokens for place in places):
        return None
    texts = (tokenizer.decode([id]) for id in range(tokenizer.vocab_size))
    return torch.tensor([KINDS.index(kind_of(text)) for text in texts])


@dataclass(frozen=True)
class Where:
    """A set of sites: those of these layers and stages (None: any); and of their tokens those at
    positions first..stop - 1 (stop None: to the end) and of one of `tokens.KINDS`.

    Written "all", "layer 2", "stage 0", "layer 2 stage 1", "positions 0:16", "positions 16:",
    "tokens digit", or these joined by spaces, in this order. Raises `ValueError`.
    """

    layer: int | None = None
    stage: int | None = None
    positions: tuple[int, int | None] | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        for name in ("layer", "stage"):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_whole(f"where.{name}", number, 0))
        if self.positions is not None:
            object.__setattr__(self, "positions", _positions(self.positions))
        if self.tokens is not None:
            check_choice(f"where is '{self}'; tokens", self.tokens, KINDS)

    @classmethod
    def parse(cls, text: str | Where | RouterSite) -> Where:
        """`ValueError` with examples for what cannot be read. A site stands for itself."""
        if isinstance(text, Where):
            return text
        if isinstance(text, RouterSite):
            return cls(text.layer, text.stage)
        parts = (r"layer (\d+)", r"stage (\d+)", r"positions (\d+):(\d*)", r"tokens (\w+)")
        pattern = "".join(rf"(?:{part}(?: |$))?" for part in parts)
        match = re.fullmatch(pattern, "" if text == "all" else str(text).strip())
        if match is None or (text != "all" and not str(text).strip()):
            raise ValueError(
                f"where is {text!r}; write 'all', 'layer 2', 'stage 0', 'layer 2 stage 1', "
                "'positions 0:16' or 'tokens digit'"
            )
        layer, stage, first, stop = (None if not g else int(g) for g in match.groups()[:4])
        return cls(layer, stage, None if first is None else (first, stop), match[5])

    def __str__(self) -> str:
        parts = [
            f"{n} {v}" for n, v in (("layer", self.layer), ("stage", self.stage)) if v is not None
        ]
        if self.positions:
            first, stop = self.positions
            parts.append(f"positions {first}:{'' if stop is None else stop}")
        if self.tokens:
            parts.append(f"tokens {self.tokens}")
        return " ".join(parts) or "all"

    def __call__(self, site: RouterSite) -> bool:
        """Whether the site belongs to the set."""
        return self.layer in (None, site.layer) and self.stage in (None, site.stage)

    def inside(self, tokens: Tokens) -> Tensor | None:
        """(T,) which tokens belong to the set, padding never; None if all do."""
        inside_T = tokens.real_T
        if self.positions:
            first, stop = self.positions
            since_T = tokens.position_T >= first
            if stop is not None:
                since_T &= tokens.position_T < stop
            inside_T = since_T if inside_T is None else inside_T & since_T
        if self.tokens:
            if tokens.kind_T is None:
                raise ValueError(f"where is '{self}'; kinds of tokens need a model with tokenizer")
            is_kind_T = tokens.kind_T == KINDS.index(self.tokens)
            inside_T = is_kind_T if inside_T is None else inside_T & is_kind_T
        return inside_T


def _positions(given: Any) -> tuple[int, int | None]:
    """(first, stop), checked."""
    try:
        first, stop = given
    except (TypeError, ValueError):
        raise ValueError(f"where.positions is {given!r}; give (first, stop), stop None") from None
    first = check_whole("first of where.positions", first, 0)
    if stop is not None and first >= (stop := check_whole("stop of where.positions", stop, 0)):
        raise ValueError(f"where is 'positions {first}:{stop}'; there is no such position")
    return first, stop


def sites_of(
    model: Adapter, where: Any = None, name: str = "where", *, tokens: bool = False
) -> list[RouterSite]:
    """The routers of the model that are asked for.

    where    None: all; a `RouterSite`, a `Where` or its text, a function of a site, or a list of
             such, each of which selects some
    name     what errors call it
    tokens   whether it may also say which tokens

    Raises `ValueError` with the routers that there are.
    """
    if where is None:
        return model.sites()
    try:
        asked = where if isinstance(where, list | tuple) else [where]
        places = [w if callable(w) else Where.parse(w) for w in asked]
    except ValueError:
        places = []
    chosen = [site for site in model.sites() if any(place(site) for place in places)]
    partial = [p for p in places if isinstance(p, Where) and (p.positions or p.tokens)]
    if not (places and all(any(map(p, chosen)) for p in places)) or (partial and not tokens):
        have = ", ".join(f"'{site}'" for site in model.sites()) or "none: it is dense"
        said = repr(str(where)) if isinstance(where, Where) else repr(where)
        whole = "" if tokens else ", all their tokens"
        raise ValueError(f"{name} is {said}; it must select routers of {model.name}{whole}: {have}")
    return chosen
