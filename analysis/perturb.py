"""Every perturbation of routing, and the dict that names them.

Shapes: T tokens, E experts, K slots. A perturbation is a frozen dataclass and pure. Kind L maps
logits to logits, `p(logits_TE, ctx)`, a masked expert getting -inf; kind D maps a decision to a
decision, `p.decide(routing, router, ctx)`, for what is no map of logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from analysis.context import RouterContext
from cartmoe.config import check_choice
from cartmoe.routing import Router, Routing, stable_topk


class Perturbation:
    """Base of all. A subclass says with what parameter value it changes nothing.

    expects   "none", "weights" or "selection": what it must change to be a test at all
    strength_field   the parameter that is its number on a plot's axis
    neutral   the value of that parameter which changes nothing
    """

    expects: ClassVar[str] = "selection"
    strength_field: ClassVar[str | None] = None
    neutral: ClassVar[Any] = 0

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
        return f"{name}({', '.join(f'{n}={v}' for n, v in changed)})" if changed else name

    def identity(self) -> Perturbation:
        """The same with the strength that changes nothing: it returns the very input."""
        if self.strength_field is None:
            return Identity()
        return replace(self, **{self.strength_field: self.neutral})

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, plain JSON types: part of a condition's identity."""
        return {"name": type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


def set_number(
    owner: object, name: str, kind: type, least: float = 0, most: float = math.inf
) -> None:
    """Make a field of a frozen dataclass a plain int or float, so that equal values have the same
    JSON (1 and 1.0, and NumPy's). Raises `ValueError` for other things and other numbers."""
    value = getattr(owner, name)
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise ValueError(f"{name} is {value!r}; it must be a {'whole ' if whole else ''}number")
    if not least <= value <= most or value == math.inf:
        span = f"lie in {least}..{most}" if most < math.inf else f"be finite and at least {least}"
        raise ValueError(f"{name} is {value!r}; it must {span}")
    object.__setattr__(owner, name, kind(value))


def mask_experts(logits_TE: Tensor, ids_TM: Tensor) -> Tensor:
    """A copy with -inf at ids_TM."""
    return logits_TE.scatter(-1, ids_TM, -torch.inf)


def chosen_mask(routing: Routing) -> Tensor:
    """(T, E) bool: the experts that a token uses; slots of weight 0 are not used."""
    mask_TE = torch.zeros_like(routing.logits_TE, dtype=torch.int8)
    return mask_TE.scatter_add_(-1, routing.ids_TK, (routing.weights_TK != 0).to(torch.int8)) > 0


@dataclass(frozen=True)
class Identity(Perturbation):
    """Changes nothing: measures what the hooks themselves do, which must be exactly nothing."""

    expects: ClassVar[str] = "none"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """The very input."""
        return logits_TE


@dataclass(frozen=True)
class DropTop(Perturbation):
    """The m highest logits of each token to -inf, ties to the lower index.

    CartesianMoE Table 4 (m = 1); DeepSeekMoE Fig. 4, which drops a ratio of all experts: give
    `ratio` in [0, 1] instead of m, rounded to whole experts.
    """

    strength_field: ClassVar[str] = "m"
    m: int = 1
    ratio: float | None = None

    def __post_init__(self) -> None:
        set_number(self, "m", int)
        if self.ratio is not None:
            set_number(self, "ratio", float, most=1)
            if self.m != 1:
                raise ValueError(f"m is {self.m} and ratio is {self.ratio}; give one of them")

    @property
    def strength(self) -> float:
        """m, or the ratio if that is given."""
        return float(self.m if self.ratio is None else self.ratio)

    @property
    def label(self) -> str:
        """ "DropTop", or "DropTop(ratio)": their strengths are other things."""
        return "DropTop" if self.ratio is None else "DropTop(ratio)"

    def identity(self) -> Perturbation:
        """m = 0."""
        return DropTop(0)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        E = logits_TE.shape[-1]
        m = self.m if self.ratio is None else round(self.ratio * E)
        if m == 0:
            return logits_TE
        if m > E:
            raise ValueError(f"m is {m}; {ctx.site.name} has only {E} experts")
        return mask_experts(logits_TE, stable_topk(logits_TE, m))


@dataclass(frozen=True)
class _DropRandom(Perturbation):
    strength_field: ClassVar[str] = "m"
    m: int = 1

    def __post_init__(self) -> None:
        set_number(self, "m", int)

    def _drop(self, logits_TE: Tensor, among_TE: Tensor, ctx: RouterContext) -> Tensor:
        if self.m == 0:
            return logits_TE
        E = logits_TE.shape[-1]
        # The same draw whichever group it is for: only `among` tells the controls apart.
        priority_TE = ctx.noise.uniform(E, "drop").masked_fill(~among_TE, 0.0)
        ids_TM = stable_topk(priority_TE, min(self.m, E))
        fill = torch.where(among_TE.gather(-1, ids_TM), -torch.inf, logits_TE.gather(-1, ids_TM))
        return logits_TE.scatter(-1, ids_TM, fill)


@dataclass(frozen=True)
class DropChosen(_DropRandom):
    """m random experts among those the token uses to -inf (all, if it uses fewer): the control
    that tells "the best one" from "any one in use"."""

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        return self._drop(logits_TE, chosen_mask(ctx.clean), ctx)


@dataclass(frozen=True)
class DropUnchosen(_DropRandom):
    """m random experts among those the token does not use to -inf: must change nothing where
    weights are made from the chosen alone; elsewhere it measures the normalisation."""

    expects: ClassVar[str] = "none"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        return self._drop(logits_TE, ~chosen_mask(ctx.clean), ctx)


SCALES = ("token", "site", "absolute")
WITHIN = ("all", "chosen")


@dataclass(frozen=True)
class GaussianNoise(Perturbation):
    """z + sigma * s * n, n standard normal.

    scale    what s is: "token" the std of the token's finite logits, "site" the site's over the
             calibration slice, "absolute" 1
    within   "all" experts, or only those "chosen" by the clean decision
    """

    strength_field: ClassVar[str] = "sigma"
    sigma: float = 1.0
    scale: str = "token"
    within: str = "all"

    def __post_init__(self) -> None:
        set_number(self, "sigma", float)
        check_choice("scale", self.scale, SCALES)
        check_choice("within", self.within, WITHIN)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A noisy copy; -inf stays -inf."""
        if self.sigma == 0:
            return logits_TE
        noise_TE = ctx.noise.normal(logits_TE.shape[-1]).to(logits_TE.dtype)
        if self.within == "chosen":
            noise_TE = noise_TE * chosen_mask(ctx.clean)
        if self.scale == "token":
            scale = finite_std(logits_TE)
        else:
            scale = ctx.need_stats(self).std if self.scale == "site" else 1.0
        return logits_TE + self.sigma * scale * noise_TE


def finite_std(logits_TE: Tensor) -> Tensor:
    """(T, 1) population std of each token's finite logits; 0 where none is finite."""
    finite_TE = logits_TE.isfinite()
    count_T1 = finite_TE.sum(-1, keepdim=True).clamp(min=1)
    z_TE = logits_TE.masked_fill(~finite_TE, 0)
    mean_T1 = z_TE.sum(-1, keepdim=True) / count_T1
    return ((z_TE - mean_T1).square() * finite_TE).sum(-1, keepdim=True).div(count_T1).sqrt()


DRAWS = ("reservoir", "permute")


@dataclass(frozen=True)
class RandomRouting(Perturbation):
    """A share of the tokens is routed as if it were another token: the ceiling of damage.

    draw   "reservoir": its logits become a row of the calibration's reservoir, which keeps the
           marginal load; "permute": its own logits are permuted over the experts
    """

    strength_field: ClassVar[str] = "share"
    share: float = 1.0
    draw: str = "reservoir"

    def __post_init__(self) -> None:
        set_number(self, "share", float, most=1)
        check_choice("draw", self.draw, DRAWS)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A copy with other rows for that share of tokens."""
        if self.share == 0:
            return logits_TE
        E = logits_TE.shape[-1]
        if self.draw == "permute":
            order_TE = ctx.noise.uniform(E, "permute").argsort(dim=-1, stable=True)
            other_TE = logits_TE.gather(-1, order_TE)
        else:
            reservoir_RE = ctx.need_stats(self).reservoir_RE
            row_T = ctx.noise.integers(len(reservoir_RE), 1, "row")[:, 0]
            other_TE = reservoir_RE.to(logits_TE)[row_T]
        return torch.where(ctx.noise.uniform(1, "who") < self.share, other_TE, logits_TE)


@dataclass(frozen=True)
class NoRouted(Perturbation):
    """The routed part is zero: the anchor that says what routed experts are worth at all."""

    expects: ClassVar[str] = "weights"

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same choice with weights of 0."""
        return routing._replace(weights_TK=torch.zeros_like(routing.weights_TK))


PERTURBATIONS: dict[str, type[Perturbation]] = {
    cls.__name__: cls
    for cls in (Identity, DropTop, DropChosen, DropUnchosen, GaussianNoise, RandomRouting, NoRouted)
}


def perturbation_from_dict(d: dict[str, Any]) -> Perturbation:
    """The inverse of `Perturbation.to_dict`; `ValueError` with the choices for a wrong name."""
    parameters = dict(d)
    name = parameters.pop("name", None)
    check_choice("perturbation", name, PERTURBATIONS)
    cls = PERTURBATIONS[name]
    for parameter in parameters:
        check_choice(f"parameter of {name}", parameter, [f.name for f in fields(cls)])
    return cls(**parameters)
