"""Perturbations that take experts away: a masked expert's logit is -inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from analysis.perturb.base import (
    Perturbation,
    check_experts,
    chosen_mask,
    mask_experts,
    set_number,
    set_numbers,
)
from analysis.perturb.context import RouterContext
from cartmoe.config import check_choice
from cartmoe.hooks import RouterSite
from cartmoe.routing import stable_topk


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

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for more experts than a router has."""
        if self.ratio is None:
            check_experts("m is", self.m, sites)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        m = self.m if self.ratio is None else round(self.ratio * logits_TE.shape[-1])
        if m == 0:
            return logits_TE
        self.check([ctx.site])
        return mask_experts(logits_TE, stable_topk(logits_TE, m))


@dataclass(frozen=True)
class KeepRanks(Perturbation):
    """Only the experts at these ranks of each token's logits stay, 1 being the highest: fewer
    experts, or others (rank-k routing of SCMoE, arXiv 2405.14507)."""

    listed: ClassVar[frozenset[str]] = frozenset({"ranks"})
    ranks: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        set_numbers(self, "ranks", 1)

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for a rank that a router does not have."""
        check_experts("ranks has", self.ranks[-1], sites)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        self.check([ctx.site])
        order_TE = stable_topk(logits_TE, logits_TE.shape[-1])
        kept_TM = order_TE[:, torch.tensor(self.ranks, device=order_TE.device) - 1]
        masked_TE = torch.full_like(logits_TE, -torch.inf)
        return masked_TE.scatter(-1, kept_TM, logits_TE.gather(-1, kept_TM))


WHICH = ("random", "most_used", "least_used")
SiteIds = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class DropExperts(Perturbation):
    """A fixed set of experts is dead for every token.

    fraction   of the experts of each router, rounded to whole ones
    which      "random" by the condition's seed; "most_used" or "least_used" by load over the
               calibration slice
    ids        instead of these, the dead experts themselves: a list for every router, or a dict
               such as {"layer 0 stage 1": [3, 5]}, by layer, by layer and stage, or by the name of
               a `RouterSite` (what a pruning method gives; NAEE, REAP); routers that it does not
               name stay whole
    """

    strength_field: ClassVar[str] = "fraction"
    listed: ClassVar[frozenset[str]] = frozenset({"ids"})
    fraction: float = 0.25
    which: str = "random"
    ids: tuple[int, ...] | SiteIds | None = None

    def __post_init__(self) -> None:
        set_number(self, "fraction", float, most=1)
        check_choice("which", self.which, WHICH)
        if self.ids is None:
            return
        if (self.fraction, self.which) != (0.25, "random"):
            raise ValueError("ids name the experts already; leave out fraction and which")
        if isinstance(self.ids, Mapping):
            object.__setattr__(self, "ids", tuple(self.ids.items()))
        if self.by_site:
            object.__setattr__(self, "ids", tuple(sorted((str(s), _ids(i)) for s, i in self.ids)))
        else:
            set_numbers(self, "ids", 0)

    @property
    def by_site(self) -> bool:
        """Whether `ids` name routers too."""
        pairs = self.ids if isinstance(self.ids, tuple | list) else ()
        return bool(pairs) and all(isinstance(i, tuple | list) and len(i) == 2 for i in pairs)

    @property
    def strength(self) -> float:
        """The fraction; NaN where ids are given."""
        return self.fraction if self.ids is None else float("nan")

    def identity(self) -> Perturbation:
        """No expert is dead."""
        return DropExperts(0.0)

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for ids of a router, or of experts, that the model does not have."""
        if self.by_site:
            known = sorted({name for site in sites for name in _names(site)})
            for name, _ in self.ids:
                check_choice("a router of ids", name, known)
        for site in sites:
            self._listed(site)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        dead = self._dead(logits_TE.shape[-1], ctx)
        if not len(dead):
            return logits_TE
        return logits_TE.index_fill(-1, dead.to(logits_TE.device), -torch.inf)

    def _listed(self, site: RouterSite) -> list[int]:
        """The dead of one router, where `ids` say which."""
        dead = set(self.ids or ())
        if self.by_site:
            dead = {e for name, ids in self.ids if name in _names(site) for e in ids}
        if dead and max(dead) >= site.num_experts:
            raise ValueError(
                f"ids has {max(dead)}; {site.name} has only {site.num_experts} experts"
            )
        return sorted(dead)

    def _dead(self, E: int, ctx: RouterContext) -> Tensor:
        if self.ids is not None:
            return torch.tensor(self._listed(ctx.site), dtype=torch.int64)
        count = round(self.fraction * E)
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        if self.which == "random":
            order_E = ctx.noise.of_experts(E, "dead").argsort(stable=True)
        else:
            load_E = ctx.need_stats(self).load_E
            order_E = load_E.argsort(descending=self.which == "most_used", stable=True)
        return order_E[:count]


def _ids(ids: object) -> tuple[int, ...]:
    good = isinstance(ids, tuple | list) and all(
        isinstance(i, Integral) and not isinstance(i, bool) and i >= 0 for i in ids
    )
    if not good:
        raise ValueError(f"ids has {ids!r}; each router's must be a list of whole numbers from 0")
    return tuple(sorted({int(i) for i in ids}))


def _names(site: RouterSite) -> tuple[str, str, str]:
    """What a router may be called."""
    return f"layer {site.layer}", f"layer {site.layer} stage {site.stage}", site.name


@dataclass(frozen=True)
class _DropRandom(Perturbation):
    strength_field: ClassVar[str] = "m"
    m: int = 1

    def __post_init__(self) -> None:
        set_number(self, "m", int)

    def check(self, sites: Sequence[RouterSite]) -> None:
        """`ValueError` for more experts than a router has."""
        check_experts("m is", self.m, sites)

    def _drop(self, logits_TE: Tensor, among_TE: Tensor, ctx: RouterContext) -> Tensor:
        if self.m == 0:
            return logits_TE
        self.check([ctx.site])
        among_TE = among_TE & (logits_TE != -torch.inf)  # after a mask, in a Compose
        # The same draw whichever group it is for: only `among` tells the controls apart.
        priority_TE = ctx.noise.uniform(logits_TE.shape[-1], "drop").masked_fill(~among_TE, 0.0)
        ids_TM = stable_topk(priority_TE, self.m)
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
