"""Perturbations of the decision itself, which are no map of logits (kind D)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from analysis.adapters import Router
from analysis.perturb.base import Identity, Perturbation
from analysis.perturb.context import RouterContext
from cartmoe.fields import Count, Flag, Positive, Share, declared
from cartmoe.routing import EPS, Routing


@declared
class NoRouted(Perturbation):
    """The routed part is zero: the anchor that says what routed experts are worth at all."""

    expects: ClassVar[str] = "weights"

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same choice with weights of 0."""
        return routing._replace(weights_TK=torch.zeros_like(routing.weights_TK))


@declared
class TopK(Perturbation):
    """Another number of experts at inference, more than were trained too (DeepSeekMoE, Fig. 5).

    The k best by the scores that choose, in place of the router's own rule (top-p as well);
    weights as the router makes them, renormalised where it renormalises.
    """

    strength_field: ClassVar[str] = "k"
    within_experts: ClassVar[tuple[str, ...]] = ("k",)
    anew: ClassVar[bool] = True
    k: Positive = 1

    def identity(self) -> Perturbation:
        """The router's own number."""
        return Identity()

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """(T, k) slots."""
        self.check([ctx.site])
        return router.decide(routing.logits_TE, routing.scores_TE, k=self.k)


@declared
class DropSlots(Perturbation):
    """Each slot in use is lost with this probability and not refilled (expert dropout).

    renormalize   whether the slots that are left take over the weight of the lost ones
    """

    strength_field: ClassVar[str] = "probability"
    probability: Share = 0.5
    renormalize: Flag = False

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same slots, some with weight 0; a token may lose all of them."""
        if self.probability == 0:
            return routing
        # Drawn by expert, so that a slot's luck does not depend on its rank.
        luck_TE = ctx.noise.uniform(routing.logits_TE.shape[-1], "slots")
        kept_TK = luck_TE.gather(-1, routing.ids_TK) >= self.probability
        weights_TK = routing.weights_TK * kept_TK
        if self.renormalize:
            before_T1 = routing.weights_TK.sum(-1, keepdim=True)
            weights_TK = weights_TK * (before_T1 / weights_TK.sum(-1, keepdim=True).clamp(min=EPS))
        return routing._replace(weights_TK=weights_TK)


@declared
class UniformWeights(Perturbation):
    """Weights of the slots in use move towards their mean by `mix` in 0..1; the set stays."""

    expects: ClassVar[str] = "weights"
    strength_field: ClassVar[str] = "mix"
    mix: Share = 1.0

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """The same choice with more even weights; their sum stays."""
        if self.mix == 0:
            return routing
        used_TK = routing.weights_TK != 0
        count_T1 = used_TK.sum(-1, keepdim=True).clamp(min=1)
        mean_T1 = routing.weights_TK.sum(-1, keepdim=True) / count_T1
        return routing._replace(
            weights_TK=torch.where(used_TK, routing.weights_TK.lerp(mean_T1, self.mix), 0)
        )


@declared
class Lag(Perturbation):
    """Stale routing: the decision that was taken `n` steps before.

    over   "tokens": of the nth token before in the sequence (the first n keep their own);
           "sites": of the nth router before with as many experts, which that router came to in
           this forward of itself, so that lags do not add up (where there is none, the router
           keeps its own)
    """

    strength_field: ClassVar[str] = "n"
    n: Count = 1
    over: Literal["tokens", "sites"] = "tokens"

    def decide(self, routing: Routing, router: Router, ctx: RouterContext) -> Routing:
        """An earlier decision; its logits and scores stand beside it."""
        if self.n == 0:
            return routing
        if self.over == "sites":
            alike = self._alike(ctx)
            return alike[-self.n] if len(alike) >= self.n else routing
        if ctx.tokens.past:
            raise ValueError(
                f"{self.label} looks back at tokens that a cache has left out of this forward; "
                "generate with use_cache=False"
            )
        # Tokens of a sequence stand one after the other, so n rows before is n tokens before.
        late_T1 = (ctx.tokens.position_T >= self.n)[:, None]
        return Routing(*(torch.where(late_T1, t.roll(self.n, dims=0), t) for t in routing))

    def reach(self, ctx: RouterContext) -> Tensor:
        """(T,): those that have a decision n steps before."""
        position_T = ctx.tokens.position_T
        if self.over == "sites":
            return torch.full_like(position_T, len(self._alike(ctx)) >= self.n, dtype=torch.bool)
        return position_T >= self.n

    def _alike(self, ctx: RouterContext) -> list[Routing]:
        return [r for s, r in ctx.own.items() if s.num_experts == ctx.site.num_experts]


def fit(rows_TK: Tensor, K: int) -> Tensor:
    """With K columns: cut, or padded with 0, which as a weight is a slot that is not used."""
    missing = K - rows_TK.shape[-1]
    return torch.nn.functional.pad(rows_TK, (0, missing)) if missing else rows_TK


def where_tokens(inside_T: Tensor, new: Routing, old: Routing) -> Routing:
    """`new` for the tokens inside, `old` for the others; they may differ in their slots."""
    K = max(new.ids_TK.shape[-1], old.ids_TK.shape[-1])
    pairs = zip(_fitted(new, K), _fitted(old, K), strict=True)
    return Routing(*(torch.where(inside_T[:, None], a, b) for a, b in pairs))


def _fitted(routing: Routing, K: int) -> Routing:
    ids_TK, weights_TK = fit(routing.ids_TK, K), fit(routing.weights_TK, K)
    return routing._replace(ids_TK=ids_TK, weights_TK=weights_TK)
