"""Flips of single slots: the worst within a budget, and as many random ones beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from analysis.adapters import Router
from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.context import RouterContext
from cartmoe.fields import Count, Positive, declared
from cartmoe.routing import Routing


@declared
class Worst(Perturbation):
    """The flips of experts that cost most within a budget, found with the gradient of the loss.

    flips    i -> j, the slot keeping its weight: at most so many per token or sequence, over all
             the routers where it acts together
    rounds   forward and backward passes among which the budget is divided; each begins where the
             flips so far have led, and those that did not raise a sequence's loss are taken back
    choose   "random": as many random flips instead, the control beside it

    See `analysis.measure.search`. It needs targets and the whole model, so it runs in studies,
    `sweep` and `compare`, not in `perturbed`.
    """

    strength_field: ClassVar[str] = "flips"
    flips: Count = 1
    per: Literal["token", "sequence"] = "token"
    rounds: Positive = 1
    choose: Literal["worst", "random"] = "worst"

    def identity(self) -> Perturbation:
        """No flip."""
        return Identity()

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """Not without a search before it."""
        raise ValueError(
            f"{self.label} is searched for with the targets of documents; use analysis.sweep or a "
            "study"
        )


@dataclass(frozen=True)
class Flips(Perturbation):
    """Flips that a search has found for one batch.

    expert_TE   by (layer, stage): the expert that runs in each one's slots (itself: no flip)
    """

    expert_TE: Mapping[tuple[int, int], Tensor] = field(default_factory=dict, compare=False)

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """Other experts in the same slots, at the same weights."""
        expert_TE = self.expert_TE.get(ctx.site.place)
        if expert_TE is None:
            return routing
        return routing._replace(ids_TK=expert_TE.gather(-1, routing.ids_TK))
