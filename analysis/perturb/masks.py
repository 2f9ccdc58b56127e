"""Perturbations that take experts away: a masked expert's logit is -inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from analysis.perturb.base import Perturbation, chosen_mask, mask_experts
from analysis.perturb.context import RouterContext
from cartmoe.config import check_choice
from cartmoe.fields import Count, Positive, Share, declared
from cartmoe.hooks import RouterSite
from cartmoe.routing import stable_topk


@declared
class DropTop(Perturbation):
    """The m highest logits of each token to -inf, ties to the lower index.

    CartesianMoE Table 4 (m = 1); DeepSeekMoE Fig. 4, which drops a ratio of all experts: give
    `ratio` in [0, 1] instead of m, rounded to whole experts.
    """

    strength_field: ClassVar[str] = "m"
    within_experts: ClassVar[tuple[str, ...]] = ("m",)
    m: Count = 1
    ratio: Share | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and self.m != 1:
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
        m = self.m if self.ratio is None else round(self.ratio * logits_TE.shape[-1])
        if m == 0:
            return logits_TE
        self.check([ctx.site])
        return mask_experts(logits_TE, stable_topk(logits_TE, m))


def _sorted(items: tuple) -> tuple:
    if len(set(items)) < len(items):
        raise ValueError("must be a list of different ones")
    return tuple(sorted(items))


DIFFERENT = AfterValidator(_sorted)


@declared
class KeepRanks(Perturbation):
    """Only the experts at these ranks of each token's logits stay, 1 being the highest: fewer
    experts, or others (rank-k routing of SCMoE, arXiv 2405.14507)."""

    listed: ClassVar[frozenset[str]] = frozenset({"ranks"})
    within_experts: ClassVar[tuple[str, ...]] = ("ranks",)
    ranks: Annotated[tuple[Positive, ...], Field(min_length=1), DIFFERENT] = (1,)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        self.check([ctx.site])
        order_TE = stable_topk(logits_TE, logits_TE.shape[-1])
        kept_TM = order_TE[:, torch.tensor(self.ranks, device=order_TE.device) - 1]
        masked_TE = torch.full_like(logits_TE, -torch.inf)
        return masked_TE.scatter(-1, kept_TM, logits_TE.gather(-1, kept_TM))


Ids = Annotated[tuple[Count, ...], DIFFERENT]
SetOfIds = Annotated[tuple[Count, ...], AfterValidator(lambda ids: tuple(sorted(set(ids))))]
SiteIds = Annotated[tuple[tuple[str, SetOfIds], ...], Field(min_length=1), DIFFERENT]


def _pairs(ids: Any) -> Any:
    return tuple((str(s), own) for s, own in ids.items()) if isinstance(ids, Mapping) else ids


PAIRS = BeforeValidator(_pairs, json_schema_input_type=list[int] | dict[str, list[int]] | None)


@declared
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
    fraction: Share = 0.25
    which: Literal["random", "most_used", "least_used"] = "random"
    ids: Annotated[Annotated[Ids, Field(min_length=1)] | SiteIds | None, PAIRS] = None

    def __post_init__(self) -> None:
        if self.ids is not None and (self.fraction, self.which) != (0.25, "random"):
            raise ValueError("ids name the experts already; leave out fraction and which")

    @property
    def by_site(self) -> bool:
        """Whether `ids` name routers too."""
        return self.ids is not None and isinstance(self.ids[0], tuple)

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
            named: Any = self.ids
            for name, _ in named:
                check_choice("a router of ids", name, known)
        for site in sites:
            self._listed(site)

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        dead = self._dead(logits_TE.shape[-1], ctx)
        if not len(dead):
            return logits_TE
        return logits_TE.index_fill(-1, dead.to(logits_TE.device), -torch.inf)

    def reach(self, ctx: RouterContext) -> Tensor | None:
        """None of a router that `ids` do not name, or of whose experts the fraction is none."""
        if self == self.identity() or len(self._dead(ctx.site.num_experts, ctx)):
            return None
        return torch.zeros_like(ctx.tokens.position_T, dtype=torch.bool)

    def _listed(self, site: RouterSite) -> list[int]:
        """The dead of one router, where `ids` say which."""
        dead: Any = self.ids or ()
        if self.by_site:
            dead = {e for name, own in dead if name in _names(site) for e in own}
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


def _names(site: RouterSite) -> tuple[str, str, str]:
    """What a router may be called."""
    return f"layer {site.layer}", f"layer {site.layer} stage {site.stage}", site.name


@declared
class _DropRandom(Perturbation):
    strength_field: ClassVar[str] = "m"
    within_experts: ClassVar[tuple[str, ...]] = ("m",)
    m: Count = 1

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


@declared
class DropChosen(_DropRandom):
    """m random experts among those the token uses to -inf (all, if it uses fewer): the control
    that tells "the best one" from "any one in use"."""

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        return self._drop(logits_TE, chosen_mask(ctx.clean), ctx)


@declared
class DropUnchosen(_DropRandom):
    """m random experts among those the token does not use to -inf: must change nothing where
    weights are made from the chosen alone; elsewhere it measures the normalisation."""

    expects: ClassVar[str] = "none"

    def __call__(self, logits_TE: Tensor, ctx: RouterContext) -> Tensor:
        """A masked copy."""
        return self._drop(logits_TE, ~chosen_mask(ctx.clean), ctx)
