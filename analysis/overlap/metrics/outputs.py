"""What experts have in common in what they compute on the same tokens: on tensors.

Debiased CKA is of all pairs at once. HSIC_1 (Song et al., JMLR 13, 2012, eq. 5) is the unbiased
estimate of HSIC. With K~ the Gram matrix of one expert's outputs on T tokens, and L~ that of
another's, both with diagonal 0,

    T (T - 3) HSIC_1(K, L) = tr K~ L~ + (1' K~ 1) (1' L~ 1) / ((T - 1) (T - 2))
                             - 2 / (T - 2) 1' K~ L~ 1.

tr K~ L~ is an inner product of matrices, so that one product of all experts' matrices, a row each,
gives all pairs. HSIC_1 does not change when outputs are shifted; centred over the tokens, the rows
of K sum to 0, those of K~ to minus its diagonal, and nothing has to be summed.

Sums over tokens add over batches; a value is made of sums, of those with a first dimension U too.

Shapes: U units, E experts, T tokens, D model, C = T * T.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from analysis.adapters import DenseRouting
from analysis.overlap.metrics.base import Sums, tensor_of
from analysis.overlap.metrics.weights import ExpertWeights
from cartmoe.routing import Routing

MIN_TOKENS = 4  # of one HSIC_1, which divides by T - 3
CONSTANT = 1e-12  # of the mean's square; variance below that is rounding in fp32
FEW = 8  # experts centred at a time: the copy of their outputs stays in the cache


def _outputs(values: Any) -> Tensor:
    return tensor_of("outputs_ETD", values, "experts, tokens, dimensions")


def swiglu(w: ExpertWeights, x_TD: Tensor, ids: list[int] | None = None) -> Tensor:
    """(E, T, D) outputs of all experts, or of those ids, on the same tokens."""
    outputs = []
    for e in range(len(w.gate_EFD)) if ids is None else ids:
        hidden_TF = nn.silu(nn.linear(x_TD, w.gate_EFD[e])) * nn.linear(x_TD, w.up_EFD[e])
        outputs.append(nn.linear(hidden_TF, w.down_EDF[e]))
    return torch.stack(outputs)


@torch.no_grad()
def hsic(outputs_ETD: Tensor) -> Tensor:
    """(E, E) fp64 HSIC_1 of each pair with linear kernels, unbiased at any T from 4 on. May be
    negative. Raises `ValueError` for fewer tokens, and other shapes than (E, T, D)."""
    outputs_ETD = _outputs(outputs_ETD)
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
    return cosines(hsic(outputs_ETD))


@torch.no_grad()
def biased_cka(outputs_ETD: Tensor) -> Tensor:
    """(E, E) plain linear CKA (arXiv 1905.00414). Warns each time: unless there are many
    times more tokens than dimensions, independent outputs are far above 0."""
    outputs_ETD = _outputs(outputs_ETD)
    T, D = outputs_ETD.shape[1:]
    warnings.warn(
        f"biased CKA is far above 0 for unrelated outputs unless T >> D; here T is {T} and D {D}. "
        "linear_cka is not biased",
        UserWarning,
        stacklevel=3,  # of the caller of the function that no_grad wraps
    )
    flat_EC = _grams(outputs_ETD).flatten(1)
    return cosines((flat_EC @ flat_EC.T).double())


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


def cosines(inner_EE: Tensor) -> Tensor:
    """Of inner products (..., E, E)."""
    norm_E = inner_EE.diagonal(dim1=-2, dim2=-1).sqrt()
    return inner_EE / (norm_E[..., None] * norm_E[..., None, :])


def hsic_sums(outputs_ETD: Tensor) -> dict[str, Tensor]:
    """(E, E) HSIC_1 of i with j, i with i and j with j, times the tokens that it is made of: it has
    the less noise the more there are. 0 of too few."""
    E, T, _ = outputs_ETD.shape
    hsic_EE = T * hsic(outputs_ETD) if T >= MIN_TOKENS else outputs_ETD.new_zeros(E, E)
    own_E = hsic_EE.diagonal()
    return {"ij": hsic_EE, "ii": own_E[:, None].expand(E, E), "jj": own_E.expand(E, E)}


def cosine(outputs_ETD: Tensor) -> Tensor:
    """(E, E) cosine of two experts' outputs, its mean over tokens; 0 where an output is zero."""
    return cosine_of(vector_sums(outputs_ETD))


def relative_distance(outputs_ETD: Tensor) -> Tensor:
    """(E, E) sqrt(sum_t ||f_i - f_j||^2 / sum_t (||f_i||^2 + ||f_j||^2) / 2): 0 for the same
    outputs, sqrt 2 for orthogonal and 2 for opposite ones."""
    return relative_distance_of(vector_sums(outputs_ETD))


def output_norm(outputs_ETD: Tensor) -> Tensor:
    """(E,) mean over tokens of ||f_i||."""
    return _outputs(outputs_ETD).double().norm(dim=-1).mean(1)


def max_output(outputs_ETD: Tensor) -> Tensor:
    """(E,) the largest |output| over tokens and dimensions: it stands out for "super experts"
    (arXiv 2507.23279)."""
    return _outputs(outputs_ETD).abs().amax((1, 2))


def reap(outputs_ETD: Tensor, routing: Routing) -> Tensor:
    """(E,) mean of g_i ||f_i|| over the tokens that are routed to i, g_i its weight in them (REAP,
    arXiv 2510.13999); NaN for an expert that has none."""
    return reap_of(expert_sums(outputs_ETD, DenseRouting(routing).weights_TE))


@torch.no_grad()
def vector_sums(outputs_ETD: Tensor) -> dict[str, Tensor]:
    """(E, E) sums over tokens of cosines, inner products and mean squared norms of two outputs, and
    the number of tokens. fp64: for the distance of two that are nearly the same."""
    outputs_TED = _outputs(outputs_ETD).double().transpose(0, 1)
    inner_TEE = outputs_TED @ outputs_TED.mT
    square_TE = inner_TEE.diagonal(dim1=1, dim2=2)
    scale_TE = square_TE.clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    square_E, inner_EE = square_TE.sum(0), inner_TEE.sum(0)
    return {
        "cosine": torch.einsum("tij,ti,tj->ij", inner_TEE, scale_TE, scale_TE),
        "inner": inner_EE,
        "energy": (square_E + square_E[:, None]) / 2,
        "tokens": torch.full_like(inner_EE, len(inner_TEE)),
    }


def pair_sums(outputs_ETD: Tensor) -> dict[str, Tensor]:
    """Both `hsic_sums` and `vector_sums`."""
    return hsic_sums(outputs_ETD) | vector_sums(outputs_ETD)


@torch.no_grad()
def expert_sums(outputs_ETD: Tensor, weights_TE: Tensor) -> dict[str, Tensor]:
    """(E,) sums over tokens for the experts by themselves."""
    norm_TE = _outputs(outputs_ETD).double().norm(dim=-1).T
    return {
        "norm": norm_TE.sum(0),
        "probed": torch.full_like(norm_TE[0], len(norm_TE)),
        "weighted": (weights_TE * norm_TE).sum(0),
        "routed": (weights_TE != 0).sum(0),
    }


def cka_of(sums: Sums) -> Tensor:
    """(E, E), or with U: a ratio of `hsic_sums`, added over minibatches (arXiv 2010.15327)."""
    return sums["ij"] / (sums["ii"] * sums["jj"]).sqrt()


def cosine_of(sums: Sums) -> Tensor:
    """From `vector_sums`."""
    return sums["cosine"] / sums["tokens"]


def relative_distance_of(sums: Sums) -> Tensor:
    """From `vector_sums`."""
    return (2 - 2 * sums["inner"] / sums["energy"]).clamp(min=0).sqrt()


def reap_of(sums: Sums) -> Tensor:
    """From `expert_sums`."""
    return sums["weighted"] / sums["routed"]
