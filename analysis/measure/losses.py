"""Losses of a model under study from its last hidden states, without all logits at once.

Shapes: T tokens, D model, V vocabulary. Losses are fp32 or better.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters import Adapter
from cartmoe.hooks import RouterSite
from cartmoe.losses import IGNORE, rows_at_once

KEEP_LOGITS = 2**25  # clean log probabilities kept for all conditions, at most: 128 MiB


def _chunks(model: Adapter, targets_T: Tensor) -> Iterator[Tensor]:
    """Rows that have a target, so many at a time."""
    rows = (targets_T != IGNORE).nonzero()[:, 0]
    yield from rows.split(rows_at_once(rows.device, model.vocab_size))


def _log_p(model: Adapter, hidden_TD: Tensor, targets_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, their log probabilities over the vocabulary)."""
    for rows in _chunks(model, targets_T):
        yield rows, model.logits(hidden_TD[rows]).log_softmax(-1)


def token_nll(model: Adapter, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """(T,) fp32 nats of each target, 0 where there is none; (X, T) of several for each token,
    (X, T), which have them in the same places."""
    targets_XT = targets_T.view(-1, len(hidden_TD))
    nll_XT = torch.zeros(targets_XT.shape, device=hidden_TD.device)
    for rows, log_p in _log_p(model, hidden_TD, targets_XT[0]):
        for nll_T, own_T in zip(nll_XT, targets_XT, strict=True):
            nll_T[rows] = F.nll_loss(log_p, own_T[rows], reduction="none")
    return nll_XT.view(targets_T.shape)


def loss_gradient(model: Adapter, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
    """(T, D) gradient of the summed nll by the hidden states."""
    gradient_TD = torch.zeros_like(hidden_TD)
    for rows in _chunks(model, targets_T):
        with torch.enable_grad():
            hidden = hidden_TD[rows].detach().requires_grad_()
            nll = F.cross_entropy(model.logits(hidden), targets_T[rows], reduction="sum")
        (gradient_TD[rows],) = torch.autograd.grad(nll, hidden)
    return gradient_TD


def output_slopes(model: Adapter, site: RouterSite, x_TD: Tensor, gradient_TD: Tensor) -> Tensor:
    """(T, E) <gradient, f_e(x)>, at least fp32: what more of each expert's output does to the loss,
    to first order. One expert after the other, so that one's outputs are kept."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    slopes = [
        (model.expert_outputs(site, x_TD, [e])[0] * gradient_TD).to(wide).sum(-1)
        for e in range(site.num_experts)
    ]
    return torch.stack(slopes, -1)


class CleanLosses(NamedTuple):
    """The clean run's losses, and what others are compared with.

    log_p    by chunk of rows, log probabilities and their best token; None where they would take
             too much memory, and are computed from `hidden_TD` each time
    """

    hidden_TD: Tensor
    targets_T: Tensor
    nll_T: Tensor
    log_p: list[tuple[Tensor, Tensor, Tensor]] | None

    @classmethod
    def unknown(cls, targets_T: Tensor) -> CleanLosses:
        """Before the clean run is at its end: its targets are known."""
        nothing = torch.empty(0)
        return cls(nothing, targets_T, nothing, None)

    @classmethod
    def of(cls, model: Adapter, hidden_TD: Tensor, targets_T: Tensor) -> CleanLosses:
        """Losses of the clean run."""
        nll_T = torch.zeros(len(hidden_TD), device=hidden_TD.device)
        kept = []
        for rows, log_p in _log_p(model, hidden_TD, targets_T):
            nll_T[rows] = F.nll_loss(log_p, targets_T[rows], reduction="none")
            if len(hidden_TD) * log_p.shape[-1] <= KEEP_LOGITS:
                kept.append((log_p, log_p.exp(), log_p.argmax(-1)))
        return cls(hidden_TD, targets_T, nll_T, kept or None)

    def compare(self, model: Adapter, hidden_TD: Tensor) -> dict[str, Tensor]:
        """Of other hidden states, (T,) fp32 each and 0 where there is no target: nll;
        kl, KL(clean || this); agree, 1 where the best token is the same."""
        nll_T = torch.zeros_like(self.nll_T)
        kl_T, agree_T = torch.zeros_like(nll_T), torch.zeros_like(nll_T)
        for number, (rows, log_p) in enumerate(_log_p(model, hidden_TD, self.targets_T)):
            if self.log_p:
                clean_log_p, clean_p, clean_best = self.log_p[number]
            else:
                clean_log_p = model.logits(self.hidden_TD[rows]).log_softmax(-1)
                clean_p, clean_best = clean_log_p.exp(), clean_log_p.argmax(-1)
            nll_T[rows] = F.nll_loss(log_p, self.targets_T[rows], reduction="none")
            agree_T[rows] = (clean_best == log_p.argmax(-1)).float()
            kl_T[rows] = clean_log_p.sub(log_p).mul_(clean_p).sum(-1)
        return {"nll": nll_T, "kl": kl_T, "agree": agree_T}
