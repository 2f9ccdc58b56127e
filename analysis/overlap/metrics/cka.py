"""Debiased CKA of experts' outputs on the same tokens, all pairs at once.

HSIC_1 (Song et al., JMLR 13, 2012, eq. 5) is the unbiased estimate of HSIC. With K~ the Gram matrix
of one expert's outputs on T tokens, and L~ that of another's, both with diagonal 0,

    T (T - 3) HSIC_1(K, L) = tr K~ L~ + (1' K~ 1) (1' L~ 1) / ((T - 1) (T - 2))
                             - 2 / (T - 2) 1' K~ L~ 1.

tr K~ L~ is an inner product of matrices, so that one product of all experts' matrices, a row each,
gives all pairs. HSIC_1 does not change when outputs are shifted; centred over the tokens, the rows
of K sum to 0, those of K~ to minus its diagonal, and nothing has to be summed.

Shapes: U units, E experts, T tokens, D model, C = T * T.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from analysis.overlap.metrics.base import Sums, tensor_of

MIN_TOKENS = 4  # of one HSIC_1, which divides by T - 3
CONSTANT = 1e-12  # of the mean's square; variance below that is rounding in fp32
FEW = 8  # experts centred at a time: the copy of their outputs stays in the cache


@torch.no_grad()
def hsic(outputs_ETD: Tensor) -> Tensor:
    """(E, E) fp64 HSIC_1 of each pair with linear kernels, unbiased at any T from 4 on. May be
    negative. Raises `ValueError` for fewer tokens, and other shapes than (E, T, D)."""
    outputs_ETD = tensor_of("outputs_ETD", outputs_ETD, "experts, tokens, dimensions")
    T = outputs_ETD.shape[1]
    if T < MIN_TOKENS:
        raise ValueError(f"outputs_ETD has {T} tokens; HSIC_1 needs at least {MIN_TOKENS}")
    grams_ETT = _grams(outputs_ETD)
    diagonal_ET = grams_ETT.diagonal(dim1=1, dim2=2).to(torch.float64, copy=True)
    grams_ETT.diagonal(dim1=1, dim2=2).zero_()
    flat_EC = grams_ETT.flatten(1)
    inner_EE = (flat_EC @ flat_EC.T).double()
    trace_E = diagonal_ET.sum(1)
    inner_EE += torch.outer(trace_E, trace_E) / ((T - 1) * (T - 2))
    inner_EE -= diagonal_ET @ diagonal_ET.T * (2 / (T - 2))
    return inner_EE / (T * (T - 3))


def linear_cka(outputs_ETD: Tensor) -> Tensor:
    """(E, E) debiased linear CKA: HSIC_1(i, j) / sqrt(HSIC_1(i, i) HSIC_1(j, j)).

    1 for outputs that are equal up to rotation, scale and shift; 0 on average for independent ones,
    so also negative; NaN for an expert whose output is constant. Raises `ValueError` for fewer than
    4 tokens. For many tokens take the ratio of sums of `hsic` over minibatches (arXiv 2010.15327).
    """
    return _cosines(hsic(outputs_ETD))


@torch.no_grad()
def biased_cka(outputs_ETD: Tensor) -> Tensor:
    """(E, E) plain linear CKA (arXiv 1905.00414). Warns each time: unless there are many
    times more tokens than dimensions, independent outputs are far above 0."""
    outputs_ETD = tensor_of("outputs_ETD", outputs_ETD, "experts, tokens, dimensions")
    T, D = outputs_ETD.shape[1:]
    warnings.warn(
        f"biased CKA is far above 0 for unrelated outputs unless T >> D; here T is {T} and D {D}. "
        "linear_cka is not biased",
        UserWarning,
        stacklevel=3,  # of the caller of the function that no_grad wraps
    )
    flat_EC = _grams(outputs_ETD).flatten(1)
    return _cosines((flat_EC @ flat_EC.T).double())


def _grams(outputs_ETD: Tensor) -> Tensor:
    """(E, T, T) Gram matrices of outputs with mean 0 over the tokens, at least fp32; all 0 of
    outputs that do not change but for rounding."""
    E, T, _ = outputs_ETD.shape
    dtype = torch.promote_types(outputs_ETD.dtype, torch.float32)
    grams_ETT = outputs_ETD.new_empty(E, T, T, dtype=dtype)
    for some_ETD, out_ETT in zip(outputs_ETD.split(FEW), grams_ETT.split(FEW), strict=True):
        some_ETD = some_ETD.to(dtype)
        mean_E1D = some_ETD.mean(1, keepdim=True)
        centred_ETD = some_ETD - mean_E1D
        torch.bmm(centred_ETD, centred_ETD.mT, out=out_ETT)
        about_mean_E = out_ETT.diagonal(dim1=1, dim2=2).mean(1)
        out_ETT[about_mean_E < CONSTANT * mean_E1D.square().sum((1, 2))] = 0
    return grams_ETT


def _cosines(inner_EE: Tensor) -> Tensor:
    norm_E = inner_EE.diagonal().sqrt()
    return inner_EE / torch.outer(norm_E, norm_E)


def hsic_sums(outputs_ETD: Tensor) -> dict[str, Tensor]:
    """(E, E) HSIC_1 of i with j, i with i and j with j, times the tokens that it is made of: it has
    the less noise the more there are. 0 of too few."""
    E, T, _ = outputs_ETD.shape
    hsic_EE = T * hsic(outputs_ETD) if T >= MIN_TOKENS else outputs_ETD.new_zeros(E, E)
    own_E = hsic_EE.diagonal()
    return {"ij": hsic_EE, "ii": own_E[:, None].expand(E, E), "jj": own_E.expand(E, E)}


def cka_of(sums: Sums) -> Tensor:
    """(E, E), or with U: a ratio of `hsic_sums`, added over minibatches (arXiv 2010.15327)."""
    return sums["ij"] / (sums["ii"] * sums["jj"]).sqrt()
