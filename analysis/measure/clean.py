"""The clean pass over one batch, which every condition on it shares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, Experts, Segment, State, branches, steps
from analysis.measure.losses import CleanLosses
from analysis.perturb import Tokens
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


@dataclass
class CleanPass:
    """What the model does when nobody disturbs it.

    states     the stream before each segment, and after the last
    routings   every router's decision;  dense  the same as vectors over the experts
    branches   by site, the routed branch's share c_0 (T,) and ||c_0 routed|| (T,)
    draws      noise that conditions have drawn on this batch: neighboring strengths share it
    """

    segments: list[Segment]
    states: list[State]
    routings: dict[RouterSite, Routing]
    dense: dict[RouterSite, DenseRouting]
    branches: dict[RouterSite, tuple[Tensor, Tensor]]
    losses: CleanLosses
    tokens: Tokens
    length: int
    draws: dict = field(default_factory=dict)

    @classmethod
    def of(cls, model: Adapter, batch: Sequences, kinds_V: Tensor | None = None) -> CleanPass:
        """One forward. Raises `FloatingPointError` if router logits are not finite."""
        segments, states = model.segments(), [State(None, batch.tokens_SL)]
        shares = Shares(model)
        with torch.no_grad(), model.hooked(experts=shares) if model.sites() else nullcontext():
            states += [after for _, _, after in steps(segments, states[0])]
            hidden_TD = states[-1].hidden_BLD.flatten(0, 1)
            losses = CleanLosses.of(model, hidden_TD, batch.targets_SL.flatten())
        routings = dict(zip(model.sites(), states[-1].decisions, strict=True))
        dense = {site: DenseRouting(r) for site, r in routings.items()}
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S, kinds_V)
        length = batch.tokens_SL.shape[1]
        return cls(segments, states, routings, dense, shares, losses, tokens, length)

    def first_segment(self, where: Callable[[RouterSite], bool]) -> int:
        """The number of the first segment in which one of these sites runs."""
        return next(i for i, s in enumerate(self.segments) if any(map(where, s.sites)))

    def residual_norm(self, number: int) -> Tensor:
        """(T,) norm of the stream before a segment."""
        return self.states[number].hidden_BLD.flatten(0, 1).float().norm(dim=-1)

    def output_change(self, number: int, before: State, after: State) -> Tensor:
        """(T,) how much a segment's output differs from the clean run's, as a share of the clean
        stream's norm before it."""
        change_BLD = after.hidden_BLD - self.states[number + 1].hidden_BLD
        if before is not self.states[number]:
            change_BLD -= before.hidden_BLD - self.states[number].hidden_BLD
        change_T = change_BLD.flatten(0, 1).float().norm(dim=-1)
        return change_T / self.residual_norm(number)


def check_finite(site: RouterSite, routing: Routing) -> None:
    """Raise `FloatingPointError` if logits are not."""
    if not routing.logits_TE.isfinite().all():
        raise FloatingPointError(f"router logits are not finite ({site})")


class Shares(dict[RouterSite, tuple[Tensor, Tensor]]):
    """Stands where experts are called, and notes `CleanPass.branches`."""

    def __init__(self, model: Adapter):
        super().__init__()
        self.model = model

    def __call__(self, x_TD: Tensor, routing: Routing, site: RouterSite, own: Experts) -> Tensor:
        routed_TD = own(x_TD, routing)
        share_T = branches(self.model, site, x_TD)[0][:, 0].float()
        self[site] = share_T, share_T * routed_TD.float().norm(dim=-1)
        return routed_TD
