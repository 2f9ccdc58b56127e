"""Routed SwiGLU experts: dispatch -> matmuls, expert by expert -> combine.

Shapes: T tokens, K slots a token, E experts, D model, F hidden width, R rows of dispatched work.

A slot is one (token, expert) pair. Slots are put in the order of their experts, so that each
expert works on one block of rows; slots of weight 0 are left out and cost nothing. The slot's
weight multiplies the hidden activation, before the down projection: y = sum_i W_down (w_i h_i) is
the same sum, and its backward needs no expert's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cartmoe.routing import Routing

# bf16 matmuls on the CPU are compiled for each number of rows, 0.4 ms each time; a block of rows
# is therefore filled up with zeros to a multiple of this, so that few numbers occur.
BF16_ROWS = 32


class Block(NamedTuple):
    """One expert's rows: rows start..start + num_used - 1 are used, those up to stop are zeros."""

    expert: int
    start: int
    num_used: int
    stop: int


class Dispatch(NamedTuple):
    """Used slots in the order of their experts.

    blocks   where each expert that has any slot works
    token_R  the token that a row works for (0 where a row is not used)
    slot_R   where the row's weight stands in weights_TK.flatten() (likewise)
    row_TK   the inverse, the row that a slot has; R for a slot that is not used
    """

    blocks: list[Block]
    token_R: Tensor
    slot_R: Tensor
    row_TK: Tensor


def dispatch(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, multiple: int = 1) -> Dispatch:
    """Sort the used slots by expert, stably; each block is filled up to `multiple` rows."""
    K = ids_TK.shape[1]
    # An unused slot goes behind every expert's. numpy's radix sort is ten times torch.sort.
    key = torch.where(weights_TK.detach() != 0, ids_TK.detach(), num_experts).flatten().numpy()
    order = np.argsort(key.astype(np.int16), kind="stable")
    counts = np.bincount(key, minlength=num_experts + 1)[:num_experts]
    sizes = -(-counts // multiple) * multiple
    starts, first = np.cumsum(sizes) - sizes, np.cumsum(counts) - counts
    R, num_used = int(sizes.sum()), int(counts.sum())
    order = order[:num_used]
    rows = np.arange(num_used) + np.repeat(starts - first, counts)
    slot_R, row_TK = np.zeros(R, np.int64), np.full(ids_TK.shape, R)
    slot_R[rows] = order
    row_TK.reshape(-1)[order] = rows
    blocks = [
        Block(e, int(starts[e]), int(counts[e]), int(starts[e] + sizes[e]))
        for e in np.flatnonzero(counts).tolist()
    ]
    slots = torch.from_numpy(slot_R)
    return Dispatch(blocks, slots // K, slots, torch.from_numpy(row_TK))


def _sum_rows(rows_RD: Tensor, d: Dispatch) -> Tensor:
    """(T, D): each token's sum of its rows; a gather, so it is fast and in a fixed order."""
    rows_RD[-1] = 0  # one row more than there is work: slots that are not used point here
    return F.embedding_bag(d.row_TK, rows_RD, mode="sum")


def _take(x_TD: Tensor, d: Dispatch, b: Block) -> Tensor:
    """The block's rows of x; zeros where a row is not used."""
    x = x_TD.index_select(0, d.token_R[b.start : b.stop])
    x[b.num_used :] = 0
    return x


def _looped(x_TD, w_R1, gate_up_ECD, down_EDF, d: Dispatch, blocks_RC: Iterable[Tensor]) -> Tensor:
    """(T, D); the pre-activations of every block are left in its `blocks_RC`."""
    y_RD = x_TD.new_empty(len(w_R1) + 1, x_TD.shape[1])
    for b, z_RC in zip(d.blocks, blocks_RC, strict=True):
        rows = slice(b.start, b.stop)
        torch.mm(_take(x_TD, d, b), gate_up_ECD[b.expert].T, out=z_RC)
        gate, up = z_RC.chunk(2, -1)
        h = F.silu(gate).mul_(up).mul_(w_R1[rows])
        torch.mm(h, down_EDF[b.expert].T, out=y_RD[rows])
    return _sum_rows(y_RD, d)


def _without_gradient(x_TD, weights_TK, gate_up_ECD, down_EDF, d: Dispatch) -> Tensor:
    """The same where nothing is kept: all blocks share one scratch, for memory that was never
    touched costs more than the products."""
    w_R1 = weights_TK.flatten()[d.slot_R, None].to(x_TD.dtype)
    sizes = [b.stop - b.start for b in d.blocks]
    scratch_RC = x_TD.new_empty(max(sizes, default=0), gate_up_ECD.shape[1])
    return _looped(x_TD, w_R1, gate_up_ECD, down_EDF, d, (scratch_RC[:size] for size in sizes))


class _LoopedExperts(torch.autograd.Function):
    """Forward and backward, one expert's rows at a time, so that temporaries stay in cache.

    Kept for the backward: the inputs and the (R, 2F) pre-activations.
    """

    @staticmethod
    def forward(ctx, x_TD, weights_TK, gate_up_ECD, down_EDF, d: Dispatch):
        z_RC = x_TD.new_empty(len(d.token_R), gate_up_ECD.shape[1])
        w_R1 = weights_TK.flatten()[d.slot_R, None].to(x_TD.dtype)
        ctx.save_for_backward(x_TD, weights_TK, w_R1, gate_up_ECD, down_EDF, z_RC)
        ctx.dispatch = d
        blocks_RC = [z_RC[b.start : b.stop] for b in d.blocks]
        return _looped(x_TD, w_R1, gate_up_ECD, down_EDF, d, blocks_RC)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TD):
        x_TD, weights_TK, w_R1, gate_up_ECD, down_EDF, z_RC = ctx.saved_tensors
        d, grad_TD = ctx.dispatch, grad_TD.contiguous()
        dx_RD = x_TD.new_empty(len(w_R1) + 1, x_TD.shape[1])
        dw_R = torch.empty(len(w_R1) + 1)
        dgate_up, ddown = torch.zeros_like(gate_up_ECD), torch.zeros_like(down_EDF)
        for b in d.blocks:
            e, rows = b.expert, slice(b.start, b.stop)
            x, dy, w = _take(x_TD, d, b), _take(grad_TD, d, b), w_R1[rows]
            gate, up = z_RC[rows].chunk(2, -1)
            silu = F.silu(gate)
            h = silu * up
            dh = dy @ down_EDF[e]
            torch.sum(dh * h, -1, dtype=torch.float32, out=dw_R[rows])
            torch.mm(dy.T, h.mul_(w), out=ddown[e])
            dh.mul_(w)
            dz = torch.empty_like(z_RC[rows])
            dgate, dup = dz.chunk(2, -1)
            torch.mul(dh, silu, out=dup)
            torch.ops.aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=dgate)
            torch.mm(dz, gate_up_ECD[e], out=dx_RD[rows])
            torch.mm(dz.T, x, out=dgate_up[e])
        dw_R[-1] = 0  # what slots that are not used point at
        dweights_TK = dw_R[d.row_TK].to(weights_TK.dtype)
        return _sum_rows(dx_RD, d), dweights_TK, dgate_up, ddown, None


class _Permuted(torch.autograd.Function):
    """rows[order], which `inverse` undoes. Autograd takes the gradient of any index for a sum
    over rows that may repeat, for which a GPU sorts them."""

    @staticmethod
    def forward(ctx, rows_RX, order_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return rows_RX[order_R]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_RX):
        (inverse_R,) = ctx.saved_tensors
        return grad_RX[inverse_R], None, None


def _grouped_experts(x_TD, routing: Routing, gate_up_ECD, down_EDF) -> Tensor:
    """The same on an accelerator, without a synchronisation: grouped matmuls over all T * K rows.

    Rows of unused slots are sorted behind the last group, where a grouped matmul leaves its output
    and its gradient uninitialised; they are set to zero before and after it, so that none spreads.
    """
    ids_TK, weights_TK = routing.ids_TK, routing.weights_TK
    (T, K), E = ids_TK.shape, len(gate_up_ECD)
    if T == 0:
        return x_TD.clone()  # nothing to do, and a grouped matmul refuses it
    key, order = torch.where(weights_TK != 0, ids_TK, E).flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=key.device))
    experts = torch.arange(E, device=key.device)
    offs = torch.searchsorted(key, experts, right=True).to(torch.int32)
    unused_R1 = (key == E)[:, None]

    def matmul(rows_RX: Tensor, weight_EYX: Tensor) -> Tensor:
        used_RX = rows_RX.masked_fill(unused_R1, 0)
        y_RY = F.grouped_mm(used_RX, weight_EYX.transpose(1, 2), offs=offs)
        return y_RY.masked_fill(unused_R1, 0)

    slots_RD = x_TD[:, None].expand(-1, K, -1).flatten(0, 1)
    x_RD = _Permuted.apply(slots_RD, order, inverse)
    w_R1 = _Permuted.apply(weights_TK.to(x_TD.dtype).view(-1, 1), order, inverse)
    gate, up = matmul(x_RD, gate_up_ECD).chunk(2, -1)
    y_RD = matmul(F.silu(gate) * up * w_R1, down_EDF)
    return _Permuted.apply(y_RD, inverse, order).view(T, K, -1).sum(1)


class RoutedExperts(nn.Module):
    """E SwiGLU experts without bias: y = sum_i w_i down_i(silu(gate_i x) * up_i x).

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
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x_TD.dtype
        x_TD, gate_up, down = (t.to(dtype) for t in (x_TD, self.gate_up_ECD, self.down_EDF))
        with torch.autocast(device, enabled=False):
            if device != "cpu":
                return _grouped_experts(x_TD, routing, gate_up, down)
            multiple = BF16_ROWS if dtype == torch.bfloat16 else 1
            d = dispatch(routing.ids_TK, routing.weights_TK, self.num_experts, multiple)
            if not torch.is_grad_enabled():
                return _without_gradient(x_TD, routing.weights_TK, gate_up, down, d)
            return _LoopedExperts.apply(x_TD, routing.weights_TK, gate_up, down, d)

    def extra_repr(self) -> str:
        E, C, D = self.gate_up_ECD.shape
        return f"num_experts={E}, d_model={D}, width={C // 2}"
