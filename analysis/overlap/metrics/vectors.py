"""Experts' outputs as vectors, token by token: cosine, distance, norm.

Sums over tokens add over batches; a value is made of sums, of those with a first dimension U too.

Shapes: U units, E experts, T tokens, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analysis.adapters import DenseRouting
from analysis.overlap.metrics.base import Sums, tensor_of
from cartmoe.routing import Routing


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


def _outputs(values: Any) -> Tensor:
    return tensor_of("outputs_ETD", values, "experts, tokens, dimensions")


def cosine_of(sums: Sums) -> Tensor:
    """From `vector_sums`."""
    return sums["cosine"] / sums["tokens"]


def relative_distance_of(sums: Sums) -> Tensor:
    """From `vector_sums`."""
    return (2 - 2 * sums["inner"] / sums["energy"]).clamp(min=0).sqrt()


def output_norm_of(sums: Sums) -> Tensor:
    """From `expert_sums`."""
    return sums["norm"] / sums["probed"]


def reap_of(sums: Sums) -> Tensor:
    """From `expert_sums`."""
    return sums["weighted"] / sums["routed"]
