"""Next-token losses without the logits of all tokens at once.

Shapes: T tokens, D model, V vocabulary. Sums are fp32 whatever the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not predicted: its loss is 0

# Logits held at once: 8 MiB in fp32, so that they stay in cache; on a GPU, where what costs is the
# start of a kernel, 512 MiB.
CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**21, 2**27


def rows_at_once(device: torch.device, vocab_size: int) -> int:
    """Of how many tokens the logits are held at once."""
    held = CHUNK_LOGITS if device.type == "cpu" else CHUNK_LOGITS_GPU
    return max(1, held // vocab_size)


def _chunks(x_TD: Tensor, vocab_size: int) -> list[slice]:
    step = rows_at_once(x_TD.device, vocab_size)
    return [slice(i, i + step) for i in range(0, len(x_TD), step)]


class _MeanLoss(torch.autograd.Function):
    """Mean nll of logits = x W^T, chunk by chunk.

    The forward already takes each chunk's gradient, (softmax - one_hot) times W and x: then no
    logits outlive their chunk, and the backward only scales.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_VD, targets_T):
        used_T = targets_T != IGNORE
        num_used = used_T.sum().clamp(min=1)
        total = torch.zeros((), device=x_TD.device)
        dx_TD = torch.empty_like(x_TD)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for c in _chunks(x_TD, len(weight_VD)):
            logits = F.linear(x_TD[c], weight_VD).float()
            target = targets_T[c, None].masked_fill(~used_T[c, None], 0)
            used = used_T[c, None].float()
            logsumexp = logits.logsumexp(-1, keepdim=True)
            total += ((logsumexp - logits.gather(-1, target)) * used).sum()
            dlogits = logits.sub_(logsumexp).exp_()
            dlogits.scatter_add_(-1, target, logits.new_full(target.shape, -1.0))
            dlogits = dlogits.mul_(used / num_used).to(x_TD.dtype)
            torch.mm(dlogits, weight_VD, out=dx_TD[c])
            dweight_VD += dlogits.T @ x_TD[c]
        ctx.save_for_backward(dx_TD, dweight_VD.to(weight_VD.dtype))
        return total / num_used

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx_TD, dweight_VD = ctx.saved_tensors
        return dx_TD * grad, dweight_VD * grad, None


def mean_loss(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Scalar fp32: mean nats over the targets that are not `IGNORE`; differentiable."""
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    with torch.autocast(device, enabled=False):
        return _MeanLoss.apply(x_TD.to(dtype), weight_VD.to(dtype), targets_T)


@torch.no_grad()
def token_losses(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """(T,) fp32 nats of each target, 0 where it is `IGNORE`. Not differentiable."""
    nll_T = torch.zeros(len(x_TD), device=x_TD.device)
    used_T = targets_T != IGNORE
    for c in _chunks(x_TD, len(weight_VD)):
        logits = F.linear(x_TD[c], weight_VD).float()
        target = targets_T[c, None].masked_fill(~used_T[c, None], 0)
        of_target = logits.gather(-1, target)
        # log-sum-exp in place: each pass over the logits is paid in memory traffic.
        highest = logits.amax(-1, keepdim=True)
        logsumexp = logits.sub_(highest).exp_().sum(-1, keepdim=True).log_().add_(highest)
        nll_T[c] = (logsumexp - of_target)[:, 0]
    return nll_T.masked_fill_(~used_T, 0)
