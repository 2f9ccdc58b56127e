"""What pairs of experts would have in common if no expert had a taste in company.

Who uses i uses m_i others; they are drawn by load f: P_ij = f_i m_i f_j / sum_{l != i} f_l, mean of
both orders. Independence would give f_i f_j, which k experts of E drawn without replacement do not
reach: with even loads m_i / sum_{l != i} f_l = (k - 1) E / ((E - 1) k).

Shapes: U units, E experts.
"""

from __future__ import annotations

from torch import Tensor

from analysis.overlap.base import Sums
from analysis.overlap.counts import loads_of


def share_of_tokens(sums: Sums) -> Tensor:
    """(U, E) f: the share of tokens that use the expert."""
    return loads_of(sums["pairs"]) / sums["tokens"][:, None]


def chance_co_activation(sums: Sums) -> Tensor:
    """(U, E, E) of the tokens that use i, the share that would use j too."""
    return _both(sums) / share_of_tokens(sums)[..., None]


def chance_lift(sums: Sums) -> Tensor:
    """(U, E, E) P_ij / (f_i f_j)."""
    f_UE = share_of_tokens(sums)
    return _both(sums) / (f_UE[..., None] * f_UE[..., None, :])


def chance_jaccard(sums: Sums) -> Tensor:
    """(U, E, E) of the tokens that would use i or j, the share that would use both."""
    f_UE, both_UEE = share_of_tokens(sums), _both(sums)
    return both_UEE / (f_UE[..., None] + f_UE[..., None, :] - both_UEE)


def _both(sums: Sums) -> Tensor:
    """(U, E, E) P_ij."""
    f_UE = share_of_tokens(sums)
    both_UEE = sums["pairs"] / sums["tokens"][:, None, None]
    company_UE = both_UEE.sum(-1) - f_UE  # f_i m_i: the diagonal is f
    drawn_UE = company_UE / (f_UE.sum(-1, keepdim=True) - f_UE)
    one_way_UEE = drawn_UE[..., None] * f_UE[..., None, :]
    return (one_way_UEE + one_way_UEE.mT) / 2
