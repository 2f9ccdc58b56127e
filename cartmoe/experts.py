"""Routed SwiGLU experts: dispatch -> one matmul after the other, expert by expert -> combine.

Shapes: T tokens, K slots a token, N used slots (at most T * K), E experts, D model, F hidden width.

A slot is one (token, expert) pair. Slots are put in the order of their experts, so that each
expert works on one block of rows; slots of weight 0 are left out and cost nothing. The slot's
weight multiplies the hidden activation, before the down projection: y = sum_i W_down (w_i h_i) is
the same sum, and its backward needs no expert's output.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cartmoe.routing import Routing


class Dispatch(NamedTuple):
    """Used slots in the order of their experts.

    token_N  the token that a row works for
    slot_N   where the row's weight stands in weights_TK.flatten()
    row_TK   the inverse: the row that a slot has; N for an unused slot
    counts   rows of each expert (E numbers, their sum is N)
    """

    token_N: Tensor
    slot_N: Tensor
    row_TK: Tensor
    counts: list[int]


def dispatch(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the used slots by expert, stably: within an expert, tokens stay in order."""
    num_slots, K = ids_TK.numel(), ids_TK.shape[1]
    ids = ids_TK.detach().flatten()
    used = (weights_TK.detach() != 0).flatten()
    # An unused slot goes behind every expert's. Radix sort: 10x torch.sort, which has none.
    key = torch.where(used, ids, num_experts).to(torch.int16)
    order = torch.from_numpy(np.argsort(key.numpy(), kind="stable"))
    counts = torch.bincount(key, minlength=num_experts + 1).tolist()[:num_experts]
    N = sum(counts)
    row = torch.empty_like(order)
    row[order] = torch.arange(num_slots)
    slot_N = order[:N]
    return Dispatch(slot_N // K, slot_N, row.clamp_(max=N).view(-1, K), counts)


def _sum_rows(rows_ND: Tensor, d: Dispatch) -> Tensor:
    """(T, D): each token's sum of its rows; a gather, so it is fast and in a fixed order."""
    N = rows_ND.shape[0] - 1
    rows_ND[N] = 0  # unused slots point here
    return F.embedding_bag(d.row_TK, rows_ND, mode="sum")


class _LoopedExperts(torch.autograd.Function):
    """Forward and backward, one expert's rows at a time, so that temporaries stay in cache.

    Saved for the backward: the inputs and the (N, 2F) pre-activations, nothing else.
    """

    @staticmethod
    def forward(ctx, x_TD, weights_TK, gate_up_ECD, down_EDF, d: Dispatch):
        w_N = weights_TK.flatten()[d.slot_N].to(x_TD.dtype)
        N, D, C = len(w_N), x_TD.shape[1], gate_up_ECD.shape[1]
        z_NC = x_TD.new_empty(N, C)
        y_ND = x_TD.new_empty(N + 1, D)
        for e, rows in _blocks(d.counts):
            z = torch.mm(x_TD.index_select(0, d.token_N[rows]), gate_up_ECD[e].T, out=z_NC[rows])
            gate, up = z.chunk(2, -1)
            h = F.silu(gate).mul_(up).mul_(w_N[rows, None])
            torch.mm(h, down_EDF[e].T, out=y_ND[rows])
        ctx.save_for_backward(x_TD, w_N, gate_up_ECD, down_EDF, z_NC)
        ctx.dispatch, ctx.weights_like = d, weights_TK
        return _sum_rows(y_ND, d)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, w_N, gate_up_ECD, down_EDF, z_NC = ctx.saved_tensors
        d = ctx.dispatch
        grad_TD = grad_TD.contiguous()
        N, D = len(w_N), x_TD.shape[1]
        dx_ND = x_TD.new_empty(N + 1, D)
        dw_N = torch.empty(N)
        dgate_up, ddown = torch.zeros_like(gate_up_ECD), torch.zeros_like(down_EDF)
        for e, rows in _blocks(d.counts):
            token, w = d.token_N[rows], w_N[rows, None]
            x, dy = x_TD.index_select(0, token), grad_TD.index_select(0, token)
            gate, up = z_NC[rows].chunk(2, -1)
            silu = F.silu(gate)
            h = silu * up
            dh = dy @ down_EDF[e]
            torch.sum(dh * h, -1, dtype=torch.float32, out=dw_N[rows])
            torch.mm(dy.T, h.mul_(w), out=ddown[e])
            dh.mul_(w)
            dz = torch.cat([torch.ops.aten.silu_backward(dh * up, gate), dh.mul_(silu)], -1)
            torch.mm(dz, gate_up_ECD[e], out=dx_ND[rows])
            torch.mm(dz.T, x, out=dgate_up[e])
        dweights = (
            torch.zeros_like(ctx.weights_like)
            .view(-1)
            .index_copy_(0, d.slot_N, dw_N.to(ctx.weights_like.dtype))
        )
        return _sum_rows(dx_ND, d), dweights.view_as(ctx.weights_like), dgate_up, ddown, None


def _blocks(counts: list[int]):
    """(expert, its rows) for every expert that has any."""
    stops = itertools.accumulate(counts)
    return [
        (e, slice(stop - n, stop))
        for e, (n, stop) in enumerate(zip(counts, stops, strict=True))
        if n
    ]


def _grouped_experts(x_TD, weights_TK, gate_up_ECD, down_EDF, d: Dispatch) -> Tensor:
    """The same on an accelerator: three grouped matmuls over all rows, autograd's own backward."""
    w_N = weights_TK.flatten()[d.slot_N].to(x_TD.dtype)
    offs = torch.tensor(list(itertools.accumulate(d.counts)), dtype=torch.int32, device=x_TD.device)
    z_NC = F.grouped_mm(x_TD[d.token_N], gate_up_ECD.transpose(1, 2), offs=offs)
    gate, up = z_NC.chunk(2, -1)
    y_ND = F.grouped_mm(F.silu(gate) * up * w_N[:, None], down_EDF.transpose(1, 2), offs=offs)
    return torch.zeros_like(x_TD).index_add(0, d.token_N, y_ND)


class RoutedExperts(nn.Module):
    """E SwiGLU experts without bias, weights stacked: y = sum_i w_i down_i(silu(gate_i x) * up_i x).

    Gate and up projection stand in one parameter of 2F rows, gate first.
    """

    def __init__(self, num_experts: int, d_model: int, width: int):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_ECD = nn.Parameter(torch.empty(num_experts, 2 * width, d_model))
        self.down_EDF = nn.Parameter(torch.empty(num_experts, d_model, width))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D), the weighted sum of the chosen experts' outputs; zero for a token without any."""
        device = x_TD.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        )
        d = dispatch(routing.ids_TK, routing.weights_TK, self.num_experts)
        run = _LoopedExperts.apply if device == "cpu" else _grouped_experts
        with torch.autocast(device, enabled=False):
            return run(
                x_TD.to(dtype),
                routing.weights_TK,
                self.gate_up_ECD.to(dtype),
                self.down_EDF.to(dtype),
                d,
            )

    def extra_repr(self) -> str:
        E, C, D = self.gate_up_ECD.shape
        return f"num_experts={E}, d_model={D}, width={C // 2}"
