"""What pairs of experts would have in common if no expert had a taste in company.

Quasi-independence (Goodman, JASA 63, 1968): P_ij = a_i a_j for i != j, with the a for which each
expert meets as many others as it does, sum_{j != i} P_ij = c_i. Independence would give f_i f_j,
which k experts of E drawn without replacement do not reach.

Shapes: U units, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.overlap.metrics.base import Sums
from analysis.overlap.metrics.usage import loads_of

ROUNDS = 200  # of the fit; slowest, within 1 % then, is one expert that is in all company


def share_of_tokens(sums: Sums) -> Tensor:
    """(U, E) f: the share of tokens that use the expert."""
    return loads_of(sums["both"]) / sums["tokens"][:, None]


def by_chance(sums: Sums) -> tuple[Tensor, Tensor]:
    """(U, E, E) P_ij, at most the smaller of both shares, which the fit may just pass; (U, E) f."""
    f_UE = share_of_tokens(sums)
    met_UEE = sums["both"] / sums["tokens"][:, None, None]
    company_UE = met_UEE.sum(-1) - f_UE  # c: the diagonal is f
    a_UE = company_UE / _positive(company_UE.sum(-1, keepdim=True)).sqrt()
    for _ in range(ROUNDS):  # to a (sum(a) - a) = c
        others_UE = a_UE.sum(-1, keepdim=True) - a_UE
        a_UE = (a_UE * company_UE / _positive(others_UE)).sqrt()
    both_UEE = a_UE[..., None] * a_UE[..., None, :]
    return both_UEE.minimum(torch.minimum(f_UE[..., None], f_UE[..., None, :])), f_UE


def _positive(x: Tensor) -> Tensor:
    """Divisors: nobody's company is 0 / 0, and counts as 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)
