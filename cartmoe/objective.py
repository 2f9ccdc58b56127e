"""What is minimized, and its gradient over all micro-batches and processes of a step.

Shapes: B sequences of a micro-batch, L tokens, E experts, S router sites of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cartmoe.distributed import Ranks
from cartmoe.hooks import router_sites
from cartmoe.model import LanguageModel
from cartmoe.precision import DTYPES
from cartmoe.recipe import TrainConfig
from cartmoe.routing import Routing, balance_loss, expert_counts, z_loss


class Objective(nn.Module):
    """nll + balance * sum of balance losses + z_loss * sum of z losses; the sums are over sites.

    A module, since DistributedDataParallel and torch.compile wrap modules.
    """

    def __init__(self, model: LanguageModel, balance: float, z_loss: float, group: Ranks):
        super().__init__()
        self.model, self.balance, self.z_loss, self.group = model, balance, z_loss, group

    def forward(
        self, tokens_BL: Tensor, counts_SE: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of (B, L + 1) tokens; its parts (nll, balance, z), detached; (S, E) counts.

        counts_SE   what the balance loss takes its shares f from. None: the counts of this
                    forward in all processes
        """
        x_BLD, routings = self.model.trunk(tokens_BL[:, :-1])
        nll = self.model.mean_loss(x_BLD, tokens_BL[:, 1:])
        if not routings:
            return nll, torch.stack([nll.detach(), *nll.new_zeros(2)]), nll.new_zeros(0, 1)
        if counts_SE is None:
            counts_SE = self._count(routings)
        balance, z = nll.new_zeros(2)
        # Without a coefficient they are only recorded.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.balance > 0):
            for routing, counts_E in zip(routings, counts_SE, strict=True):
                balance = balance + balance_loss(routing.scores_TE, counts_E)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.z_loss > 0):
            for routing in routings:
                z = z + z_loss(routing.logits_TE)
        loss = nll + self.balance * balance + self.z_loss * z
        return loss, torch.stack([nll, balance, z]).detach(), counts_SE

    @torch.no_grad()
    def count(self, tokens_BL: Tensor) -> Tensor:
        """The (S, E) counts of (B, L + 1) tokens in all processes, and nothing else."""
        return self._count(self.model.trunk(tokens_BL[:, :-1])[1])

    def _count(self, routings: Sequence[Routing]) -> Tensor:
        return self.group.sum(torch.stack([expert_counts(r) for r in routings]))


def num_parts(config: TrainConfig, group: Ranks) -> int:
    """Into how many micro-batches a step's batch is cut. `ValueError` if it does not divide."""
    parts = config.accumulate * group.size
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}; it must be a multiple of accumulate times the "
            f"number of processes = {parts}"
        )
    return parts


class Gradient:
    """The gradient of one optimizer step.

    The rows of the step's batch are cut into accumulate * processes parts. Part a * processes + r
    is the a-th micro-batch of process r, so that many processes and one that accumulates see the
    same parts and agree up to rounding.
    """

    def __init__(self, model: LanguageModel, config: TrainConfig, group: Ranks):
        self.config, self.group, self.num_parts = config, group, num_parts(config, group)
        self.routed = bool(router_sites(model))
        self.objective = Objective(model, config.balance, config.z_loss, group)
        if config.compile:
            self.objective.compile()
        self.wrapped: Any = self.objective
        if group.size > 1:
            self.wrapped = DistributedDataParallel(self.objective, gradient_as_bucket_view=True)

    def __call__(self, tokens_BL: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Add it to the parameters' `grad`, for the whole step's (B, L + 1) tokens.

        Returns the parts (nll, balance, z) and the (S, E) expert counts of the whole step. The
        balance loss needs these counts before any backward: with accumulate > 1 they come from a
        pass without gradients, which costs a forward.
        """
        parts = tokens_BL.chunk(self.num_parts)
        own = range(self.group.rank, self.num_parts, self.group.size)
        counts = None
        if len(own) > 1 and self.config.balance and self.routed:
            counts = sum(self._run(self.objective.count, parts[i], step, i) for i in own)
        losses, counted = [], []
        for i in own:
            last = i == own[-1]
            wait = nullcontext() if last or self.group.size == 1 else self.wrapped.no_sync()
            with wait:
                loss, of_part, counts_of_part = self._run(self.wrapped, parts[i], step, i, counts)
                (loss / len(own)).backward()
            losses.append(of_part)
            counted.append(counts_of_part)
        mean = self.group.sum(torch.stack(losses).sum(0)) / self.num_parts
        return mean, sum(counted) if counts is None else counts

    def _run(
        self,
        run: Callable[..., Any],
        tokens_BL: Tensor,
        step: int,
        part: int,
        *counts: Tensor | None,
    ) -> Any:
        # For router_noise: the same whether the run was resumed, and in the pass that counts.
        seed = np.random.SeedSequence([self.config.seed, step, part]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        device = self.group.device
        on = self.config.precision == "bf16"
        with torch.autocast(torch.device(device).type, DTYPES["bf16"], enabled=on):
            return run(tokens_BL.to(device), *counts)
