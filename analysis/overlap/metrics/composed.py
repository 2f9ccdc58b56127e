"""Composed experts of a Cartesian layer: what (a_i, then b_j) adds to the residual stream.

With u the stream, h = norm(u), mix and shared expert as in the layer, and gates of 1,

    a_i = combine(h, f_i(h)),  v_i = u + a_i,  o_ij = v_i + combine(norm(v_i), F_j(norm(v_i))) - u.

In a parallel layer B reads h too, and o_ij = a_i + combine(h, F_j(h)) is additive.

Shapes: T tokens, D model, F expert width, A and B experts of the two stages, N sets of tokens that
enter B, R rows (N * T).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters import Adapter, branches
from cartmoe.hooks import RouterSite


class Layer:
    """Two stages; `parallel` if both read the same stream."""

    def __init__(self, model: Adapter, first: RouterSite, second: RouterSite):
        self.model, self.first, self.second = model, first, second
        self.parallel = any({first, second} <= set(segment.sites) for segment in model.segments())

    def first_outputs(self, u_TD: Tensor) -> Tensor:
        """(A, T, D) a_i."""
        h_TD = self.model.stage_input(self.first, u_TD)
        share_TD, rest_TD = branches(self.model, self.first, h_TD)
        return rest_TD + share_TD * self.model.expert_outputs(self.first, h_TD)

    def block(self, u_TD: Tensor, a_ATD: Tensor, with_mean: bool = False) -> Block:
        """These tokens as B sees them. with_mean: B is fed the mean of v too, behind all v_i."""
        if self.parallel:
            x_NTD = self.model.stage_input(self.first, u_TD)[None]
        else:
            v_NTD = u_TD + a_ATD
            if with_mean:
                v_NTD = torch.cat([v_NTD, v_NTD.mean(0, keepdim=True)])
            x_NTD = self.model.stage_input(self.second, v_NTD)
        share_RD, rest_RD = branches(self.model, self.second, x_NTD.flatten(0, 1))
        rows_ATD = wide(a_ATD + rest_RD.view_as(x_NTD)[: len(a_ATD)])
        experts = self.model.expert_weights(self.second)
        gate_RF, up_RF = u_TD.new_empty(2, len(share_RD), experts[0].shape[1])
        scratch = gate_RF, up_RF, torch.empty_like(share_RD)
        return Block(rows_ATD, x_NTD, share_RD.view_as(x_NTD), experts, scratch)


class Block(NamedTuple):
    """Some tokens: o_ij = rows_i + share_i F_j(x_i), F_j without the layer's mix.

    rows_ATD   a_i and, of B, the shared expert's part, at least fp32
    x_NTD, share_NTD   for each i, and behind them for the mean of v; or one for all i
    experts    of B: gate (B, F, D), up (B, F, D), down (B, D, F)
    scratch    (R, F) twice and (R, D), which every `routed` overwrites
    """

    rows_ATD: Tensor
    x_NTD: Tensor
    share_NTD: Tensor
    experts: tuple[Tensor, Tensor, Tensor]
    scratch: tuple[Tensor, Tensor, Tensor]

    def routed(self, j: int) -> Tensor:
        """(N, T, D) share_i F_j(x_i); one expert on the rows of all i at once, in place."""
        gate_FD, up_FD, down_DF = (weight[j] for weight in self.experts)
        gate_RF, up_RF, y_RD = self.scratch
        x_RD = self.x_NTD.flatten(0, 1)
        torch.mm(x_RD, gate_FD.T, out=gate_RF)
        torch.mm(x_RD, up_FD.T, out=up_RF)
        torch.mm(F.silu(gate_RF, inplace=True).mul_(up_RF), down_DF.T, out=y_RD)
        return y_RD.view_as(self.x_NTD).mul_(self.share_NTD)


def wide(x: Tensor) -> Tensor:
    """At least fp32; x itself if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
