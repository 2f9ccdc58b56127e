"""Routers: gate -> logits -> score -> choose -> weigh, and the losses that keep them in balance.

Shapes: T tokens, D model, E experts, K slots a token (top-k: the K chosen; top-p: all E).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps  # floor of the sum that weights are divided by (paper.md)


class Routing(NamedTuple):
    """What one router decided for T tokens.

    logits_TE   the gate's output, fp32; -inf where a perturbation masked an expert
    scores_TE   score(logits), >= 0; a masked expert has 0
    ids_TK      chosen experts, best first, int64; an id may stand twice, then its weights add
    weights_TK  what each chosen expert's output is multiplied by; a slot of weight 0 is unused
    """

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """(T, k) indices of the k highest scores, best first, ties to the lower index.

    `Tensor.topk` breaks ties in no fixed order, so tied rows are sorted stably. On the CPU those
    rows alone, since a sort costs three times a topk; elsewhere all, to spare a synchronisation.
    """
    num_experts = scores_TE.shape[-1]
    if scores_TE.device.type != "cpu" or k == num_experts:
        return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values, ids = scores_TE.topk(k + 1)  # one more: a tie at the border counts too
    ids_TK = ids[:, :k]
    tied_T = (values[:, 1:] == values[:, :-1]).any(-1)
    if tied_T.any():
        ids_TK = ids_TK.clone()
        ids_TK[tied_T] = scores_TE[tied_T].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ids_TK


class LinearGate(nn.Module):
    """Logits are a learned linear map of the hidden state, in fp32 under any autocast."""

    def __init__(self, d_model: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """(T, E) fp32 logits."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class TableGate(nn.Module):
    """Logits stand in a fixed random table by token id (hash layers, arXiv 2106.04426).

    One instance serves every layer of a model. Entries are standard normal draws of `seed`.
    """

    table_VE: Tensor

    def __init__(self, vocab_size: int, num_experts: int, seed: int):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        table_VE = torch.randn(vocab_size, num_experts, generator=generator, device="cpu")
        self.register_buffer("table_VE", table_VE)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """(T, E) fp32 logits, whatever x_TD is."""
        return F.embedding(token_ids_T, self.table_VE).float()


class Router(nn.Module):
    """Which experts each token goes to. `score`, `choose` and `weigh` are pure.

    top_p   None for top-k; otherwise experts by descending score until the running sum exceeds
            top_p (the one that crosses is kept; all, if the sum never does), K = E slots
    renormalize   weights are divided by their sum over the chosen
    score   "softmax", or "sigmoid": then a selection bias is added for choosing, never for
            weighing (arXiv 2408.15664)
    noise   std of Gaussian noise added to the logits while training
    """

    selection_bias_E: Tensor  # with a sigmoid alone

    def __init__(
        self,
        gate: nn.Module,
        num_experts: int,
        top_k: int,
        *,
        top_p: float | None = None,
        renormalize: bool = True,
        score: str = "softmax",
        noise: float = 0.0,
    ):
        super().__init__()
        self.gate = gate
        self.num_experts, self.top_k, self.top_p = num_experts, top_k, top_p
        self.renormalize, self.score_function, self.noise = renormalize, score, noise
        if score == "sigmoid":
            self.register_buffer("selection_bias_E", torch.zeros(num_experts))
        self.num_nonfinite: Tensor | None = None  # tokens, of the last forward; see raise_nonfinite

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> Routing:
        """The routing of T tokens. x_TD (T, D); token_ids_T (T,) is used by a table gate only."""
        logits_TE = self.gate(x_TD, token_ids_T)
        self.num_nonfinite = (~logits_TE.detach().isfinite()).any(-1).sum()
        if self.training and self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        return self.route(logits_TE)

    def route(self, logits_TE: Tensor) -> Routing:
        """The decision that these logits lead to."""
        return self.decide(logits_TE, self.score(logits_TE))

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, k: int | None = None) -> Routing:
        """The decision that these scores lead to; the logits are only kept beside it.

        k   experts to use in place of the router's own top_k or top_p
        """
        ids_TK = self.choose(scores_TE, k)
        used_TK = torch.ones_like(ids_TK, dtype=torch.bool) if k else None
        return Routing(logits_TE, scores_TE, ids_TK, self.weigh(scores_TE, ids_TK, used_TK))

    def score(self, logits_TE: Tensor) -> Tensor:
        """(T, E) scores; -inf gives 0, also in a row that has nothing else."""
        if self.score_function == "sigmoid":
            return logits_TE.sigmoid()
        nothing_T1 = logits_TE.amax(-1, keepdim=True) == -torch.inf  # 0/0 in a softmax
        return logits_TE.masked_fill(nothing_T1, 0).softmax(-1).masked_fill(nothing_T1, 0)

    def selection_scores(self, scores_TE: Tensor) -> Tensor:
        """(T, E) what experts are chosen by: the scores, and with a sigmoid the bias too."""
        if self.score_function != "sigmoid":
            return scores_TE
        # A masked expert has score 0, and must stay behind one with a low bias.
        return (scores_TE + self.selection_bias_E).masked_fill(scores_TE == 0, -torch.inf)

    def choose(self, scores_TE: Tensor, k: int | None = None) -> Tensor:
        """(T, K) ids, best first, ties to the lower id; k in place of the router's own number."""
        slots = k or (self.num_experts if self.top_p else self.top_k)
        return stable_topk(self.selection_scores(scores_TE.detach()), slots)

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor, used_TK: Tensor | None = None) -> Tensor:
        """(T, K) weights of these experts, of which `used_TK` are in use; None: all, or as many of
        them as top_p takes."""
        weights_TK = scores_TE.gather(-1, ids_TK)
        if used_TK is not None:
            weights_TK = weights_TK * used_TK
        elif self.top_p:
            before_TK = F.pad(weights_TK.detach().cumsum(-1)[:, :-1], (1, 0))
            weights_TK = weights_TK * (before_TK <= self.top_p)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=EPS)
        return weights_TK

    @property
    def rows(self) -> Tensor | None:
        """(E, D) what logits are inner products with; None for a table."""
        return self.gate.weight if isinstance(self.gate, LinearGate) else None

    @property
    def facts(self) -> dict[str, float]:
        """top_k (NaN with top-p, whose number varies), renormalize (0 or 1), num_experts."""
        top_k = float("nan") if self.top_p else self.top_k
        return dict(top_k=top_k, renormalize=float(self.renormalize), num_experts=self.num_experts)

    @property
    def by_logits(self) -> bool:
        """Whether the top_k highest logits are used, whatever else they are."""
        return not self.top_p and self.score_function == "softmax"

    def margin(self, routing: Routing, count_T: Tensor) -> Tensor:
        """(T,) how far a decision that uses count_T experts is from another set.

        top-k    z_(k) - z_(k+1), in logits; where a bias selects, the same in selection scores; 0
                 if all experts are used
        top-p    the distance of the running sum of probabilities to p, on the nearer side
        """
        last_T1 = (count_T - 1).clamp(min=0)[:, None]
        if self.top_p:
            sum_TE = routing.scores_TE.sort(-1, descending=True).values.cumsum(-1)
            after_T1, before_T1 = (
                sum_TE.gather(-1, last_T1),
                F.pad(sum_TE, (1, 0)).gather(-1, last_T1),
            )
            return torch.minimum(after_T1 - self.top_p, self.top_p - before_T1)[:, 0].abs()
        decides_TE = (
            routing.logits_TE if self.by_logits else self.selection_scores(routing.scores_TE)
        )
        sorted_TE = decides_TE.sort(-1, descending=True).values
        next_T1 = (last_T1 + 1).clamp(max=self.num_experts - 1)
        return (sorted_TE.gather(-1, last_T1) - sorted_TE.gather(-1, next_T1))[:, 0]

    def extra_repr(self) -> str:
        chosen = f"top_p={self.top_p}" if self.top_p else f"top_k={self.top_k}"
        return f"num_experts={self.num_experts}, {chosen}, renormalize={self.renormalize}"


def raise_nonfinite(routers: Iterable[tuple[str, Any]]) -> None:
    """Raise `FloatingPointError` if a gate's own output was NaN or infinite in the last forward.

    routers   (where it stands, what has its `num_nonfinite`). One synchronisation for all of them.
    """
    seen = [(where, r.num_nonfinite) for where, r in routers if r.num_nonfinite is not None]
    if not seen:
        return
    counts = torch.stack([count for _, count in seen]).tolist()
    if any(counts):
        bad = ", ".join(
            f"{where}: {n} tokens" for (where, _), n in zip(seen, counts, strict=True) if n
        )
        raise FloatingPointError(f"router logits are not finite ({bad})")


def expert_counts(routing: Routing) -> Tensor:
    """(E,) int64: how many used slots each expert has."""
    num_experts = routing.logits_TE.shape[-1]
    used_ids = routing.ids_TK.masked_fill(routing.weights_TK.detach() == 0, num_experts)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=used_ids.device)
    slots = used_ids.flatten()  # `bincount` would wait for a GPU
    return counts_E.scatter_add_(0, slots, torch.ones_like(slots))[:num_experts]


def balance_loss(scores_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i: 1 when balanced, E when one expert has all (Switch, arXiv 2101.03961).

    f_i is expert i's share of the used slots, P_i its mean share of a token's scores. `counts_E`
    may come from more tokens than `scores_TE` (all ranks, a whole accumulated step): the loss is
    linear in P, so the parts then average to the loss of the whole.
    """
    num_experts = scores_TE.shape[-1]
    f_E = counts_E / counts_E.sum().clamp(min=1)
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=EPS)
    return num_experts * (f_E * shares_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits_TE.logsumexp(-1).square().mean()


@torch.no_grad()
def update_selection_bias(router: Router, counts_E: Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), after a step of training (arXiv 2408.15664)."""
    load_E = counts_E.to(router.selection_bias_E.dtype)
    router.selection_bias_E += rate * (load_E.mean() - load_E).sign()
