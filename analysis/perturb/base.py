"""What every perturbation is, and what several of them need.

Shapes: T tokens, E experts, K slots. A perturbation is a frozen dataclass and pure. Kind L maps
logits to logits, `p(logits_TE, ctx)`, a masked expert getting -inf; kind D maps a decision to a
decision, `p.decide(routing, router, ctx)`, for what is no map of logits.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from analysis.perturb.context import RouterContext
from analysis.perturb.source import code_sha256
from cartmoe.cards import card
from cartmoe.fields import declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

POINTS = ("logits", "scores")
EXPECTS = ("none", "weights", "selection", "output")


def about(cls: type) -> str:
    """The first paragraph of a class' docstring, in a line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


class Perturbation:
    """Base of all. A subclass says with what parameter value it changes nothing.

    expects   what it must change to be a test at all: "none", "weights", "selection", or "output"
              (of the layer, while the routing stays)
    strength_field   the parameter that is its number on a plot's axis
    neutral   the value of that parameter which changes nothing
    listed    parameters whose value is a list, so that a study's TOML does not take one list for
              several conditions
    within_experts   parameters that may not be larger than the number of a router's experts
    anew      whether a decision is replaced, whatever it was, so that it undoes one before it
    source    the parameter that names another run, of which it needs something
    """

    expects: ClassVar[str] = "selection"
    strength_field: ClassVar[str | None] = None
    neutral: ClassVar[Any] = 0
    listed: ClassVar[frozenset[str]] = frozenset()
    within_experts: ClassVar[tuple[str, ...]] = ()
    anew: ClassVar[bool] = False
    source: ClassVar[str | None] = None
    __dataclass_fields__: ClassVar[dict[str, Any]]  # a subclass is a dataclass

    @property
    def strength(self) -> float:
        """Its number on a plot's axis; NaN if it has none."""
        return float(getattr(self, self.strength_field)) if self.strength_field else float("nan")

    @property
    def label(self) -> str:
        """Name and those parameters, other than the strength, that are not at their default."""
        other = [f for f in fields(self) if f.name != self.strength_field]
        changed = [(f.name, v) for f in other if (v := getattr(self, f.name)) != f.default]
        name = type(self).__name__
        return f"{name}({', '.join(f'{n}={show(v)}' for n, v in changed)})" if changed else name

    def _repr_html_(self) -> str:
        """With what it does."""
        return card(repr(self), {"what it does": about(type(self))})

    @property
    def points(self) -> tuple[str, ...]:
        """The points (see `Condition`) that it, and all that it is made of, can work at."""
        return tuple(p for p in POINTS if all(p in part.points for part in self.inner()))

    @property
    def needs_input(self) -> bool:
        """Whether it needs what enters the router, which nothing does under "replay"."""
        return any(part.needs_input for part in self.inner())

    @property
    def models(self) -> tuple[Any, ...]:
        """The models in memory that it asks, other than the one that it acts in."""
        return tuple(model for part in self.inner() for model in part.models)

    def identity(self) -> Perturbation:
        """The same with the strength that changes nothing: it returns the very input."""
        if self.inner():
            return map_inner(self, lambda part: part.identity())
        if self.strength_field is None:
            return Identity()
        return replace(self, **{self.strength_field: self.neutral})

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, plain JSON types: part of a condition's identity. Of a class that
        is not of this package also a hash of its code, since other code is another one."""
        cls = type(self)
        named: dict[str, Any] = {"name": cls.__name__}
        if not cls.__module__.startswith("analysis."):
            named = {"name": f"{cls.__module__}:{cls.__qualname__}", "source": code_sha256(cls)}
        return named | {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def check(self, sites: Sequence[RouterSite]) -> None:
        """Raise `ValueError` if it cannot act on these routers of a model."""
        for part in self.inner():
            part.check(sites)
        for name, site in product(self.within_experts, sites):
            value = getattr(self, name)
            largest, said = (max(value), "has") if isinstance(value, tuple) else (value, "is")
            if largest > site.num_experts:
                have = f"{site.name} has only {site.num_experts} experts"
                raise ValueError(f"{name} {said} {largest}; {have}")

    def reach(self, ctx: RouterContext) -> Tensor | None:
        """(T,) bool: the tokens whose decision it could change at this router, None for all; of
        what is made of others, those that any of them could. No damage says nothing about others.
        """
        masks = [part.reach(ctx) for part in self.inner()]
        known = [mask_T for mask_T in masks if mask_T is not None]
        return torch.stack(known).any(0) if masks and len(known) == len(masks) else None

    def inner(self) -> tuple[Perturbation, ...]:
        """Those that it is made of."""
        values = (getattr(self, f.name) for f in fields(self))
        several = (value if isinstance(value, tuple) else (value,) for value in values)
        return tuple(p for some in several for p in some if isinstance(p, Perturbation))


def parts_of(p: Perturbation) -> Iterator[Perturbation]:
    """It, and all that it is made of."""
    yield p
    for part in p.inner():
        yield from parts_of(part)


def map_inner(p: Perturbation, fn: Callable[[Perturbation], Perturbation]) -> Perturbation:
    """With fn(part) in the place of each that it is made of; itself if they stay."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return fn(value) if isinstance(value, Perturbation) else value

    old = {f.name: getattr(p, f.name) for f in fields(p)}
    new = {name: of(value) for name, value in old.items()}
    changed = {n: v for n, v in new.items() if v is not old[n] and v != old[n]}
    return replace(p, **changed) if changed else p


def plain(value: Any) -> Any:
    """Plain JSON types for a parameter."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def canonical(value: dict[str, Any]) -> str:
    """The JSON of plain types, one text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def show(value: Any) -> str:
    """A parameter in a label, which may not have parentheses or ", " of its own."""
    if isinstance(value, Perturbation):
        strength = "" if math.isnan(value.strength) else f" {value.strength:.12g}"
        return flat(value.label) + strength
    if isinstance(value, tuple | list):
        return "+".join(map(show, value))
    return str(value)


def flat(label: str) -> str:
    """A label as part of another one."""
    return label.replace("(", " ").replace(")", "").replace(", ", " ")


def mask_experts(logits_TE: Tensor, ids_TM: Tensor) -> Tensor:
    """A copy with -inf at ids_TM."""
    return logits_TE.scatter(-1, ids_TM, -torch.inf)


def chosen_mask(routing: Routing) -> Tensor:
    """(T, E) bool: the experts that a token uses; slots of weight 0 are not used."""
    mask_TE = torch.zeros_like(routing.logits_TE, dtype=torch.int8)
    return mask_TE.scatter_add_(-1, routing.ids_TK, (routing.weights_TK != 0).to(torch.int8)) > 0


def finite_std(logits_TE: Tensor) -> Tensor:
    """(T, 1) population std of each token's finite logits; 0 where none is finite."""
    finite_TE = logits_TE.isfinite()
    count_T1 = finite_TE.sum(-1, keepdim=True).clamp(min=1)
    z_TE = logits_TE.masked_fill(~finite_TE, 0)
    mean_T1 = z_TE.sum(-1, keepdim=True) / count_T1
    return ((z_TE - mean_T1).square() * finite_TE).sum(-1, keepdim=True).div(count_T1).sqrt()


@declared
class Identity(Perturbation):
    """Changes nothing: measures what the hooks themselves do, which must be exactly nothing."""

    expects: ClassVar[str] = "none"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The very input."""
        return logits_TE


def import_name(text: str) -> Any:
    """What "package.module:name" names; `ValueError` saying what is not there."""
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module of yours raises
        raise ValueError(
            f"{text!r} cannot be imported ({error}); write 'package.module:name'"
        ) from error
    return found
