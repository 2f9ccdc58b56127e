"""What the labels of tokens, their class or domain, say of the experts that they use: from counts.

Shapes: E experts, V classes of tokens; X, Y, Z values of any three variables; ... as many leading
dimensions as there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import entr

from analysis.overlap.metrics.base import tensor_of
from analysis.overlap.metrics.counts import jaccard_of, pair_counts


def entropy(counts_X: Tensor) -> Tensor:
    """(...) nats, of counts (..., X), corrected after Miller and Madow by (cells - 1) / 2N, N the
    sum of the counts and cells the number of them that are not 0 (Paninski, Neural Computation 15,
    2003). NaN where nothing was counted."""
    counts_X = tensor_of("counts_X", counts_X, "..., values")
    total = counts_X.sum(-1)
    plain = entr(counts_X / total[..., None]).sum(-1)
    return plain + ((counts_X > 0).sum(-1) - 1) / (2 * total)


def mutual_information(joint_XY: Tensor) -> Tensor:
    """(...) I(X; Y) in nats, of counts (..., X, Y), each entropy corrected as in `entropy`."""
    joint_XY = tensor_of("joint_XY", joint_XY, "..., values, values")
    return entropy(joint_XY.sum(-1)) + entropy(joint_XY.sum(-2)) - entropy(joint_XY.flatten(-2))


def conditional_mutual_information(joint_XYZ: Tensor) -> Tensor:
    """(...) I(X; Y | Z) = H(X, Z) + H(Y, Z) - H(X, Y, Z) - H(Z) in nats, of counts (..., X, Y, Z),
    each entropy corrected as in `entropy`."""
    joint_XYZ = tensor_of("joint_XYZ", joint_XYZ, "..., values, values, values")
    joint_XZ, joint_YZ = joint_XYZ.sum(-2), joint_XYZ.sum(-3)
    both = entropy(joint_XZ.flatten(-2)) + entropy(joint_YZ.flatten(-2))
    return both - entropy(joint_XYZ.flatten(-3)) - entropy(joint_YZ.sum(-2))


def js_divergence(counts_EV: Tensor) -> Tensor:
    """(E, E) fp64 nats: Jensen-Shannon divergence H((p_i + p_j) / 2) - (H(p_i) + H(p_j)) / 2 of the
    distributions p = counts / sum; from 0 to log 2, NaN where one has no counts."""
    p_EV = tensor_of("counts_EV", counts_EV, "experts, classes").double()
    p_EV = p_EV / p_EV.sum(-1, keepdim=True)
    entropy_E = entr(p_EV).sum(-1)
    pairs = zip(p_EV, entropy_E, strict=True)  # one row at a time, for E x V numbers of memory
    rows = [entr((p_EV + p_V) / 2).sum(-1) - (entropy_E + own) / 2 for p_V, own in pairs]
    return torch.stack(rows).clamp(min=0)


def class_jaccard(counts_EV: Tensor) -> Tensor:
    """(E, E) fp64: of the classes that i or j was used for at all, the share that both were; NaN
    where neither was used."""
    used_VE = tensor_of("counts_EV", counts_EV, "experts, classes").mT > 0
    return jaccard_of(pair_counts(used_VE, used_VE))


def vocabulary_specialization(counts_EV: Tensor, tokens_V: Tensor) -> Tensor:
    """(E,) fp64: n_iv / n_v, of a class's tokens the share that uses i, mean over i's tokens.

    n_iv / n_v is OLMoE's (arXiv 2409.02060, eq. 8).

    counts_EV   n_iv: tokens of class v that use i
    tokens_V    n_v: tokens of class v
    """
    counts_EV = counts_EV.double()
    share_EV = counts_EV / tokens_V.clamp(min=1)
    return (counts_EV * share_EV).sum(-1) / counts_EV.sum(-1)
