"""A router of anybody's model, asked through its own forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.seams import Call
from analysis.adapters.tap import Roles, Stop, Tap
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

PROBED = 256  # rows of random logits that tell what a router does


@dataclass(frozen=True)
class TappedRouter:
    """See `analysis.adapters.base.Router`. Where it has other classes than experts, they count as
    experts here.

    module    whose forward makes the decision;  call: how it is called
    decided   (what it returns) -> ids (T, K), weights (T, K)
    ranked    whether these are the best first, and not in the order of its choice
    scored    whether its scores are known: told them, it decides what it decided
    facts     top_k, renormalize (1 where weights have one sum whatever they are), num_experts
    by_logits whether it uses the top_k highest logits, whatever else they are
    """

    site: RouterSite
    module: nn.Module
    call: Call
    roles: Roles
    decided: Callable[[Any], tuple[Tensor, Tensor]]
    ranked: bool = False
    scored: bool = True
    facts: dict[str, float] = field(default_factory=dict, compare=False)
    by_logits: bool = False

    def described(self, device: torch.device) -> TappedRouter:
        """The same with `facts` and `by_logits`, found once, on random logits."""
        generator = torch.Generator().manual_seed(0)
        logits_TE = torch.randn(PROBED, self.site.num_experts, generator=generator)
        routing = self.route(logits_TE.to(device))
        sum_T = routing.weights_TK.sum(-1)
        one = float((sum_T - sum_T.mean()).abs().max() < 1e-3 * sum_T.mean())
        top_k, num_experts = self.site.top_k, self.site.num_experts
        highest_TK = routing.logits_TE.topk(routing.ids_TK.shape[-1]).indices
        return replace(
            self,
            facts=dict(top_k=top_k, renormalize=one, num_experts=num_experts),
            by_logits=torch.equal(highest_TK.sort(-1).values, routing.ids_TK.sort(-1).values),
        )

    def _run(self, tokens: int, x_TD: Tensor | None = None, **changes: Any) -> tuple[Tap, Any]:
        """Its forward on so many tokens, on zeros where what enters it makes no difference."""
        tap, result = Tap(self.roles, **changes), None
        with torch.no_grad(), tap, suppress(Stop):
            result = self.call.again(self.module, tokens, x_TD)
        return tap, result

    def routing(self, tap: Tap, ids_TK: Tensor, weights_TK: Tensor) -> Routing:
        """What it decided in the forward that was tapped, best first, in fp32."""
        if not self.ranked:
            ids_TK, weights_TK = _best_first(tap, ids_TK, weights_TK)
        logits_TE = _rows(tap.logits).float()
        return Routing(logits_TE, self._scores(tap), ids_TK, weights_TK.float())

    def _scores(self, tap: Tap) -> Tensor:
        if not self.scored:
            return torch.full_like(_rows(tap.logits), torch.nan, dtype=torch.float32)
        if tap.scores is not None:
            return _rows(tap.scores).float()
        decides_TE = _rows(tap.logits if tap.choosing is None else tap.choosing).float()
        if self.roles.by_sigmoid:
            return decides_TE.sigmoid()
        nothing_T1 = decides_TE.amax(-1, keepdim=True) == -torch.inf  # 0/0 in a softmax
        return decides_TE.masked_fill(nothing_T1, 0).softmax(-1).masked_fill(nothing_T1, 0)

    def score(self, logits_TE: Tensor) -> Tensor:
        """(T, E): those of all experts that its own code makes; where that makes weights of the
        chosen alone, the same function of all. Raises `ValueError` where they cannot be told."""
        self._needs_scores()
        return self._scores(self._run(len(logits_TE), logits_TE=logits_TE)[0])

    def route(self, logits_TE: Tensor) -> Routing:
        """The decision that its own code makes of these logits."""
        return self._decision(logits_TE, {"logits_TE": logits_TE})

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, k: int | None = None) -> Routing:
        """The decision that its own code makes of these scores. Raises `ValueError` where it cannot
        be told them, or another number of experts."""
        self._needs_scores()
        if k is not None:
            self._needs_choice("another number of experts")
        return self._decision(logits_TE, self._told(scores_TE) | {"k": k})

    def _decision(self, logits_TE: Tensor, told: dict[str, Any]) -> Routing:
        tap, result = self._run(len(logits_TE), **told)
        ids_TK, weights_TK = self.decided(result)
        if len(ids_TK) != len(logits_TE):
            raise ValueError(f"{self.site.name} cannot use another number of experts")
        never_TK = tap.never_TE.gather(-1, ids_TK)
        made = self.routing(tap, ids_TK, weights_TK.masked_fill(never_TK, 0))
        return made._replace(logits_TE=logits_TE)

    def _told(self, scores_TE: Tensor) -> dict[str, Tensor]:
        """How its code is told scores: of a softmax of the chosen they are that of their log."""
        if self.roles.scores is not None:
            return {"scores_TE": scores_TE}
        return {"logits_TE": scores_TE.logit() if self.roles.by_sigmoid else scores_TE.log()}

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor, used_TK: Tensor | None = None) -> Tensor:
        """(T, K) weights that its own code gives to these experts."""
        self._needs_scores()
        self._needs_choice("weights of a set that it did not choose")
        if used_TK is not None:
            used_TE = torch.zeros_like(scores_TE).scatter_add_(-1, ids_TK, used_TK.to(scores_TE))
            scores_TE = scores_TE.masked_fill(used_TE == 0, 0)
        told = self._told(scores_TE)
        found_TK, weights_TK = self.decided(self._run(len(scores_TE), ids_TK=ids_TK, **told)[1])
        weights_TK = weights_TK.float()
        if not torch.equal(found_TK, ids_TK):  # in another order
            nothing_TE = torch.zeros_like(scores_TE, dtype=torch.float32)
            weights_TK = nothing_TE.scatter(-1, found_TK, weights_TK).gather(-1, ids_TK)
        # Where all of a set have score 0 its code divides 0 by 0.
        weights_TK = weights_TK.masked_fill(scores_TE.gather(-1, ids_TK) == 0, 0)
        return weights_TK if used_TK is None else weights_TK * used_TK

    def margin(self, routing: Routing, count_T: Tensor) -> Tensor:
        """(T,) by how much the last that is used is ahead of the next in what the choice is made
        from, or in logits, where those alone decide; 0 if all are used."""
        decides_TE = routing.logits_TE
        if not self.by_logits:
            self._needs_choice("a margin")
            tap, _ = self._run(len(decides_TE), logits_TE=decides_TE)
            decides_TE = _rows(tap.choosing).float()
        last_T1 = (count_T - 1).clamp(min=0)[:, None]
        sorted_TE = decides_TE.sort(-1, descending=True).values
        next_T1 = (last_T1 + 1).clamp(max=sorted_TE.shape[-1] - 1)
        return (sorted_TE.gather(-1, last_T1) - sorted_TE.gather(-1, next_T1))[:, 0]

    def _needs_scores(self) -> None:
        if not self.scored:
            raise ValueError(
                f"{self.site.name} makes weights of its logits in a way that is not known here, so "
                'its scores cannot be told: conditions at point "scores", and of weights or sets '
                "alone, have no meaning in it"
            )

    def _needs_choice(self, what: str) -> None:
        if self.roles.choice is None:
            raise ValueError(
                f"{self.site.name} chooses its experts without a top-k, so {what} cannot be told "
                "from its code"
            )

    def gate(self, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """(T, E) logits of these hidden states. Raises `ValueError` where they depend on more."""
        return _rows(self._run(len(x_TD), x_TD, until_logits=True)[0].logits).float()

    @property
    def rows(self) -> Tensor | None:
        """(E, D): its one matrix, if it has one with a row an expert."""
        matrices = [p for p in self.module.parameters() if p.ndim == 2]
        fitting = [p for p in matrices if len(p) == self.site.num_experts]
        return fitting[0] if len(fitting) == 1 else None


def _rows(values: Tensor) -> Tensor:
    """(T, E), however they stand."""
    return values.reshape(-1, values.shape[-1])


def _best_first(tap: Tap, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The slots in the order of what they were chosen by; a top-k need not sort."""
    by_TK = weights_TK if tap.values is None else tap.values.reshape(ids_TK.shape)
    if (by_TK[:, :-1] >= by_TK[:, 1:]).all():
        return ids_TK, weights_TK
    order_TK = by_TK.argsort(dim=-1, descending=True, stable=True)
    return ids_TK.gather(-1, order_TK), weights_TK.gather(-1, order_TK)
