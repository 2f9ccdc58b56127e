"""What it costs to put one expert in another's place, to first order: this is damage itself.

Where expert j runs in i's slot at i's weight g, the routed output y moves by g (f_j(h) - f_i(h)),
and the loss, to first order, by the product of that with dloss/dy. If j is chosen already, its
weights add and the same holds. `analysis.substitution` runs the model with such a change.

Shapes: U units, T tokens, E experts, D model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting
from analysis.measure import output_slopes
from analysis.overlap.metrics.base import Metric, Probe, Sums, UnitSums
from cartmoe.hooks import RouterSite


def linear_substitution(slopes_TE: Tensor, weights_TE: Tensor) -> Tensor:
    """(E, E) nats per token routed to i, if j runs in its place: entry (i, j) is the mean of
    g_i <dloss/dy, f_j(h) - f_i(h)> over the tokens with weight g_i != 0.

    slopes_TE    <dloss/dy, f_e(h)> of each expert, whether it is chosen or not
    weights_TE   of each expert; 0 where it is not chosen

    fp64, 0 on the diagonal; a row of NaN for an expert that no token is routed to.
    """
    return _substitution(_sums(slopes_TE, weights_TE))


class SubstitutionStream:
    """Sums for the metrics below over the tokens of one site; of fixed size, U * E * E."""

    def __init__(self, model: Adapter, site: RouterSite, units: int):
        self.model, self.site = model, site
        self._sums = UnitSums(units)

    @torch.no_grad()
    def add(self, probe: Probe) -> None:
        """Add a batch, whose probe has gradients."""
        assert probe.gradient_TD is not None
        slopes_TE = output_slopes(self.model, self.site, probe.x_TD, probe.gradient_TD)
        self._sums.add(probe.unit, **_sums(slopes_TE, DenseRouting(probe.routing).weights_TE))

    def sums(self) -> Sums:
        """slopes (U, E, E), routed (U, E)."""
        return self._sums


def _sums(slopes_TE: Tensor, weights_TE: Tensor) -> dict[str, Tensor]:
    """slopes   entry (i, j): sum of g_i <dloss/dy, f_j>
    routed   how many tokens have each expert in use"""
    weights_TE = weights_TE.double()
    return {"slopes": weights_TE.T @ slopes_TE.double(), "routed": (weights_TE != 0).sum(0)}


def _substitution(sums: Sums) -> Tensor:
    slopes_UEE, routed_UE = sums["slopes"], sums["routed"]
    own_UE = slopes_UEE.diagonal(dim1=-2, dim2=-1)
    return (slopes_UEE - own_UE[..., None]) / routed_UE[..., None]


def _removal(sums: Sums) -> Tensor:
    return -sums["slopes"].diagonal(dim1=-2, dim2=-1) / sums["routed"]


PAIRS, EXPERTS = (partial(Metric, "function", table) for table in ("pairs", "experts"))
METRICS = {
    "substitution": PAIRS(
        _substitution,
        "rise of the loss, to first order, if expert_j runs in expert_i's slots at its weight; "
        "nats per token routed to expert_i",
    ),
    "removal_linear": EXPERTS(
        _removal,
        "rise of the loss, to first order, if the expert is taken away and not refilled; nats per "
        "token routed to it",
    ),
}
