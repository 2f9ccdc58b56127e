"""Which experts tokens use, with whom, and what their labels say of it: on tensors and counts.

Weights say which slots are in use: one of weight 0 is not. An expert that stands twice in a row is
used once; its weights add up. Decisions are tensors or arrays, such as the `routed_experts` of a
serving engine at one layer. A label is a token's class or domain.

Shapes: T tokens, E experts, K slots; F experts and J slots at the site before; V classes of tokens;
X, Y, Z values of any three variables; ... as many leading dimensions as there are.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.special import entr

from analysis.overlap.metrics.base import tensor_of

CHUNK = 2**20  # tokens; fp32 counts are exact below 2^24


def used_mask(ids_TK: Any, num_experts: int, weights_TK: Any = None) -> Tensor:
    """(T, E) bool: the experts that each token uses; without weights, all that stand there.

    Raises `ValueError` for ids that are not (T, K) whole numbers from 0 to E - 1, and for weights
    of another shape, or that are NaN.
    """
    if not isinstance(num_experts, Integral) or num_experts < 1:
        raise ValueError(f"num_experts is {num_experts!r}; it must be a whole number, at least 1")
    ids_TK = tensor_of("ids_TK", ids_TK, "tokens, slots")
    if ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        raise ValueError(f"ids_TK is of {ids_TK.dtype}; give whole numbers (tokens, slots)")
    ids_TK = ids_TK.long()
    if ids_TK.numel() and not 0 <= ids_TK.min() <= ids_TK.max() < num_experts:
        found = f"{ids_TK.min()} to {ids_TK.max()}"
        raise ValueError(f"ids_TK has {found}; with {num_experts} experts, 0 to {num_experts - 1}")
    if weights_TK is not None:
        weights_TK = tensor_of("weights_TK", weights_TK, "tokens, slots")
        if weights_TK.shape != ids_TK.shape:
            shapes = f"{tuple(weights_TK.shape)}; ids_TK has {tuple(ids_TK.shape)}"
            raise ValueError(f"weights_TK has shape {shapes}: give a weight for each id")
        if weights_TK.isnan().any():
            raise ValueError(f"weights_TK has {int(weights_TK.isnan().sum())} that are NaN")
        ids_TK = ids_TK.masked_fill(weights_TK.to(ids_TK.device) == 0, num_experts)
    elif ids_TK.shape[1] > 1 and (alone_T := (ids_TK == ids_TK[:, :1]).all(-1)).any():
        warnings.warn(
            f"ids_TK has for {int(alone_T.sum())} of {len(ids_TK)} tokens one expert in all slots: "
            "rows that an engine did not capture? Trace.from_arrays finds them",
            stacklevel=3,
        )
    nobody_TE = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return nobody_TE.scatter_(-1, ids_TK, True)[:, :num_experts]


def both_counts(used_TF: Tensor, used_TE: Tensor) -> Tensor:
    """(F, E) fp64: how many tokens use both; of a mask and itself, loads are on the diagonal."""
    parts = zip(used_TF.split(CHUNK), used_TE.split(CHUNK), strict=True)
    return sum(a_TF.float().mT @ b_TE.float() for a_TF, b_TE in parts).double()


def loads_of(both_EE: Tensor) -> Tensor:
    """(..., E) tokens that use each expert, of `both_counts` (..., E, E)."""
    return both_EE.diagonal(dim1=-2, dim2=-1)


def co_activation(ids_TK: Any, num_experts: int, weights_TK: Any = None) -> Tensor:
    """(E, E) fp64 C_ij = n_ij / n_i: of the tokens that use i, the share that uses j too.

    OLMoE (arXiv 2409.02060), eq. 6, over all pairs of a token's experts, whatever their ranks. The
    diagonal is 1; a row is NaN where i is never used. Raises as `used_mask`.
    """
    return co_activation_of(*_company(used_mask(ids_TK, num_experts, weights_TK)))


def lift(ids_TK: Any, num_experts: int, weights_TK: Any = None) -> Tensor:
    """(E, E) fp64 P_ij / (P_i P_j): 1 for experts that are used independently, NaN where one is
    never used. Raises as `used_mask`."""
    return lift_of(*_company(used_mask(ids_TK, num_experts, weights_TK)))


def jaccard(ids_TK: Any, num_experts: int, weights_TK: Any = None) -> Tensor:
    """(E, E) fp64 n_ij / (n_i + n_j - n_ij): of the tokens that use i or j, the share that uses
    both; NaN where neither is ever used. Raises as `used_mask`."""
    return jaccard_of(*_company(used_mask(ids_TK, num_experts, weights_TK)))


def _company(used_TE: Tensor) -> tuple[Tensor, Tensor, int]:
    """(E, E) tokens that use both, (E,) that use one, and how many there are."""
    both_EE = both_counts(used_TE, used_TE)
    return both_EE, loads_of(both_EE), len(used_TE)


def co_activation_of(both_EE: Tensor, load_E: Tensor, tokens: Any) -> Tensor:
    """`co_activation` of counts (..., E, E), (..., E) and (..., 1, 1), or of shares of one."""
    return both_EE / load_E[..., None]


def lift_of(both_EE: Tensor, load_E: Tensor, tokens: Any) -> Tensor:
    """`lift` of the same."""
    return both_EE * tokens / (load_E[..., None] * load_E[..., None, :])


def jaccard_of(both_EE: Tensor, load_E: Tensor, tokens: Any) -> Tensor:
    """`jaccard` of the same."""
    return both_EE / (load_E[..., None] + load_E[..., None, :] - both_EE)


def transition(
    ids_before_TJ: Any,
    ids_TK: Any,
    num_experts_before: int,
    num_experts: int,
    weights_before_TJ: Any = None,
    weights_TK: Any = None,
) -> Tensor:
    """(F, E) fp64 n_ij / n_i: of the tokens that use i at the site before, the share that uses j at
    this one, over all pairs; NaN where i is never used. Raises as `used_mask`."""
    before_TF = used_mask(ids_before_TJ, num_experts_before, weights_before_TJ)
    _check_tokens(ids_before_TJ=before_TF, ids_TK=ids_TK)
    both_FE = both_counts(before_TF, used_mask(ids_TK, num_experts, weights_TK))
    return both_FE / before_TF.sum(0).double()[:, None]


def saturation(
    ids_TK: Any,
    final_ids_TK: Any,
    num_experts: int,
    weights_TK: Any = None,
    final_weights_TK: Any = None,
) -> Tensor:
    """(T,) fp64 |S and S_final| / |S_final|, experts used by a checkpoint and by the final one.

    Its mean over tokens is OLMoE's (arXiv 2409.02060, eq. 5), whose k here is the number that the
    token uses finally; NaN where that is 0. Raises as `used_mask`.
    """
    used_TE = used_mask(ids_TK, num_experts, weights_TK)
    final_TE = used_mask(final_ids_TK, num_experts, final_weights_TK)
    _check_tokens(ids_TK=used_TE, final_ids_TK=final_TE)
    return saturation_of(used_TE, final_TE)


def saturation_of(used_TE: Tensor, final_TE: Tensor) -> Tensor:
    """`saturation` of two `used_mask`."""
    return (used_TE & final_TE).sum(-1).double() / final_TE.sum(-1)


def _check_tokens(**ids: Any) -> None:
    """Raise `ValueError` with both names and lengths unless there are as many tokens."""
    (first, a), (second, b) = ids.items()
    if len(a) != len(b):
        raise ValueError(f"{first} has {len(a)} tokens, {second} {len(b)}; give the same ones")


def share(amount_E: Tensor) -> Tensor:
    """Each of these (..., E) over their sum."""
    return amount_E / amount_E.sum(-1, keepdim=True)


def gini(load_E: Tensor) -> Tensor:
    """(...) of loads (..., E): mean |x_i - x_j| over all pairs / twice the mean; 0 for even loads,
    1 - 1 / E if one expert has all."""
    load_E = tensor_of("load_E", load_E, "..., experts")
    E = load_E.shape[-1]
    rank_E = torch.arange(1, E + 1, device=load_E.device)
    sorted_E = load_E.double().sort(-1).values
    return ((2 * rank_E - E - 1) * sorted_E).sum(-1) / (E * sorted_E.sum(-1))


def max_vio(load_E: Tensor) -> Tensor:
    """(...) of loads (..., E): the largest over the mean, less 1 (MaxVio, arXiv 2408.15664); 0
    for even loads, E - 1 if one expert has all."""
    load_E = tensor_of("load_E", load_E, "..., experts")
    return load_E.amax(-1) / load_E.double().mean(-1) - 1


def load_entropy(load_E: Tensor) -> Tensor:
    """(...) of loads (..., E): entropy of their shares / log E; 1 for even loads, 0 if one expert
    has all, NaN for a single expert."""
    share_E = share(tensor_of("load_E", load_E, "..., experts").double())
    return entr(share_E).sum(-1) / math.log(share_E.shape[-1])


def committee(weight_E: Tensor, size: Tensor) -> Tensor:
    """(...) the share that the `size` (...) experts with the most weight (..., E) have together; of
    a size that is no whole number the next expert counts in part. arXiv 2601.03425 calls such a
    group a standing committee."""
    share_E = share(weight_E).sort(-1, descending=True).values
    part_E = (size[..., None] - torch.arange(weight_E.shape[-1], device=size.device)).clamp(0, 1)
    return (share_E * part_E).sum(-1)


def entropy(counts_X: Tensor) -> Tensor:
    """(...) nats, of counts (..., X), corrected after Miller and Madow by (cells - 1) / 2N, N the
    sum of the counts and cells the number of them that are not 0 (Paninski, Neural Computation 15,
    2003). NaN where nothing was counted."""
    counts_X = tensor_of("counts_X", counts_X, "..., values")
    cells = (counts_X > 0).sum(-1)
    return entr(share(counts_X)).sum(-1) + (cells - 1) / (2 * counts_X.sum(-1))


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
    p_EV = share(tensor_of("counts_EV", counts_EV, "experts, classes").double())
    entropy_E = entr(p_EV).sum(-1)
    each = zip(p_EV, entropy_E, strict=True)  # one row at a time, for E x V numbers of memory
    rows = [entr((p_EV + p_V) / 2).sum(-1) - (entropy_E + own) / 2 for p_V, own in each]
    return torch.stack(rows).clamp(min=0)


def class_jaccard(counts_EV: Tensor) -> Tensor:
    """(E, E) fp64: of the classes that i or j was used for at all, the share that both were; NaN
    where neither was used."""
    used_VE = tensor_of("counts_EV", counts_EV, "experts, classes").mT > 0
    return jaccard_of(*_company(used_VE))


def vocabulary_specialization(counts_EV: Tensor, tokens_V: Tensor) -> Tensor:
    """(E,) fp64: n_iv / n_v, of a class's tokens the share that uses i, mean over i's tokens.

    n_iv / n_v is OLMoE's (arXiv 2409.02060, eq. 8).

    counts_EV   n_iv: tokens of class v that use i
    tokens_V    n_v: tokens of class v
    """
    counts_EV = counts_EV.double()
    share_EV = counts_EV / tokens_V.clamp(min=1)
    return (counts_EV * share_EV).sum(-1) / counts_EV.sum(-1)
