"""What experts have in common in their parameters alone, up to the symmetries of SwiGLU.

An expert computes sum_n d_n silu(g_n . x) (u_n . x) over its neurons n. It stays the same function
when its neurons change places, one permutation for gate, up and down, and when a neuron's (u, d)
becomes (a u, d / a) for any a but 0. Nothing else is free: the gate's scale and sign matter.

Shapes: E experts, F neurons, D model.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as nn
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from analysis.adapters import Adapter
from analysis.overlap.metrics.base import Metric, tensor_of
from analysis.overlap.metrics.cores import on_cores
from analysis.overlap.metrics.usage import share
from cartmoe.hooks import RouterSite

BLOCK = 8  # experts that one is compared with at a time: their similarities stay in the cache
NULL_EXPERTS = 4  # re-initialised ones; all of their 6 pairs make the null of the matched cosine


class ExpertWeights(NamedTuple):
    """Projections of the experts of one site; router_ED where logits are inner products with it.

    A shared expert may stand last; the router has no row for it. Functions below take arrays too,
    and raise `ValueError` for shapes that do not fit and for weights that are not finite.
    """

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor
    router_ED: Tensor | None = None

    @classmethod
    def of(cls, model: Adapter, site: RouterSite) -> ExpertWeights:
        """Those of a site, the shared expert last if it is as wide as the others."""
        matrices = [matrix.detach() for matrix in model.expert_weights(site)]
        shared = model.shared_weights(site)
        if shared is not None and shared[0].shape == matrices[0].shape[1:]:
            pairs = zip(matrices, shared, strict=True)
            matrices = [torch.cat([own, other.detach()[None]]) for own, other in pairs]
        rows_ED = model.router(site).rows
        return cls(*matrices)._replace(router_ED=None if rows_ED is None else rows_ED.detach())

    @torch.no_grad()
    def reinitialized(self, *seed: int) -> ExpertWeights:
        """Experts of independent normal entries, each matrix with the standard deviation that it
        has here; no router. The same seed gives the same ones on every device."""
        rng = np.random.default_rng(seed)
        return ExpertWeights(*(_normal(rng, m, m.std((1, 2), keepdim=True)) for m in self[:3]))


def _normal(rng: np.random.Generator, like_EXY: Tensor, spread: Tensor) -> Tensor:
    """(E, X, Y) independent normal entries of this spread."""
    normal_EXY = torch.from_numpy(rng.standard_normal(like_EXY.shape, np.float32))
    return normal_EXY.to(like_EXY) * spread


@torch.no_grad()
def flat_cosine(w: ExpertWeights) -> Tensor:
    """(E, E) cosines of all weights of an expert as one vector: blind to symmetries."""
    flat = [matrix.float().flatten(1) for matrix in _checked(w)]
    gate_EE, up_EE, down_EE = (matrix @ matrix.T for matrix in flat)
    return _normalized(gate_EE + up_EE + down_EE)


@torch.no_grad()
def router_cosine(w: ExpertWeights) -> Tensor:
    """(E, E) cosines of the router's rows. Raises `ValueError` where there are none."""
    if w.router_ED is None:
        raise ValueError("router_ED is None: this router has no rows to compare")
    rows_ED = tensor_of("router_ED", w.router_ED, "experts, model").float()
    return _normalized(rows_ED @ rows_ED.T)


def _normalized(inner_EE: Tensor) -> Tensor:
    """Cosines from inner products; 0 with a vector of zeros, but 1 of any with itself."""
    norm_E = inner_EE.diagonal().sqrt()
    norm_E = norm_E.where(norm_E > 0, 1)
    return (inner_EE / torch.outer(norm_E, norm_E)).fill_diagonal_(1)


@torch.no_grad()
def matched_cosine(w: ExpertWeights) -> Tensor:
    """(E, E) cosines of experts whose neurons are matched as well as they can be: 1 for experts
    that are the same function by the symmetries above.

    Neurons are balanced, ||u|| = ||d||. Then n of one expert and m of another have similarity
    g_n . g_m + |u_n . u_m + d_n . d_m|; the one matching that makes the sum over neurons largest
    (Hungarian method) is divided by the root of both experts' own sums.
    """
    gate_EFD, rest_EFC = _balanced(*_checked(w))
    square_E = gate_EFD.square().sum((1, 2)) + rest_EFC.square().sum((1, 2))
    E = len(square_E)

    def matched(pair: tuple[int, int]) -> list[float]:
        """Expert i with a few from `first` on."""
        i, first = pair
        others = slice(first, first + BLOCK)
        similarity = (rest_EFC[others].flatten(0, 1) @ rest_EFC[i].T).abs_()
        similarity.addmm_(gate_EFD[others].flatten(0, 1), gate_EFD[i].T)
        blocks_JFF = similarity.unflatten(0, (-1, gate_EFD.shape[1])).cpu()
        return [_assigned(block_FF) for block_FF in blocks_JFF]

    blocks = [(i, first) for i in range(E) for first in range(i + 1, E, BLOCK)]
    sum_EE = torch.zeros(E, E, dtype=torch.float64)
    # A worker's products run on its own core: the assignments keep every core busy.
    for (i, first), sums in zip(blocks, on_cores(matched, blocks), strict=True):
        sum_EE[i, first : first + BLOCK] = torch.tensor(sums, dtype=torch.float64)
    sum_EE = sum_EE + sum_EE.T + torch.diag(square_E.cpu().double())
    return _normalized(sum_EE)


def _checked(w: ExpertWeights) -> list[Tensor]:
    """gate (E, F, D), up (E, F, D), down (E, D, F); see `ExpertWeights` for errors."""
    if not isinstance(w, ExpertWeights):
        found = type(w).__name__
        raise ValueError(f"w is a {found}; give ExpertWeights(gate_EFD, up_EFD, down_EDF)")
    names = ("experts, neurons, model",) * 2 + ("experts, model, neurons",)
    matrices = list(map(tensor_of, w._fields, w[:3], names))
    gate, up, down = (tuple(matrix.shape) for matrix in matrices)
    if not gate == up == (down[0], down[2], down[1]):
        raise ValueError(
            f"gate_EFD, up_EFD, down_EDF have shapes {gate}, {up}, {down}; they must be twice "
            "(experts, neurons, model), and (experts, model, neurons)"
        )
    for matrix in matrices:
        _check_finite(matrix)
    return matrices


def _check_finite(matrix_EXY: Tensor) -> None:
    bad = (~matrix_EXY.float().square().sum((1, 2)).isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"weights are not finite: those of experts {', '.join(map(str, bad))}")


def _balanced(gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor]:
    """gate (E, F, D), and up and down (E, F, 2 D) with equal norms; a neuron of which one is 0
    computes nothing, and has zeros for both."""
    up_EFD, down_EFD = up_EFD.float(), down_EDF.float().mT
    norm_EF1 = (up_EFD.norm(dim=-1, keepdim=True) * down_EFD.norm(dim=-1, keepdim=True)).sqrt()
    sides = [nn.normalize(side, dim=-1) * norm_EF1 for side in (up_EFD, down_EFD)]
    return gate_EFD.float(), torch.cat(sides, -1)


def _assigned(similarity_FF: Tensor) -> float:
    """The largest sum of similarities under a permutation.

    What is taken from a whole row or column changes no choice; with zeros in every one of them the
    search is a third shorter.
    """
    cost_FF = similarity_FF.amax(1, keepdim=True) - similarity_FF
    cost_FF -= cost_FF.amin(0)
    rows, columns = linear_sum_assignment(cost_FF.double().numpy())
    return similarity_FF[rows, columns].double().sum().item()


@torch.no_grad()
def effective_rank(matrix_EXY: Tensor) -> Tensor:
    """(E,) exp of the entropy, in nats, of singular values divided by their sum (Roy and Vetterli,
    EUSIPCO 2007): 1 to min(X, Y), NaN of a matrix of zeros. Raises `ValueError` for matrices that
    are not finite."""
    matrix_EXY = tensor_of("matrix_EXY", matrix_EXY, "experts, rows, columns")
    _check_finite(matrix_EXY)
    values_ES = torch.linalg.svdvals(matrix_EXY.float()).double()
    return torch.special.entr(share(values_ES)).sum(-1).exp()


def _matched_null(w: ExpertWeights) -> Tensor:
    """Of a few experts with the root mean square of all experts' spreads: the order of experts does
    not matter."""
    rng = np.random.default_rng(0)
    few = [_normal(rng, m[:NULL_EXPERTS], m.std((1, 2)).square().mean().sqrt()) for m in w[:3]]
    matched_EE = matched_cosine(ExpertWeights(*few))
    return matched_EE[~torch.eye(len(matched_EE), dtype=torch.bool)].mean()


def _rank_null(matrix_EXY: Tensor) -> Tensor:
    """Of the first one's shape; the rank does not depend on the spread."""
    return effective_rank(_normal(np.random.default_rng(0), matrix_EXY[:1], torch.ones(())))


# Of parameters alone: there is nothing to resample.
PAIRS, EXPERTS = (partial(Metric, "weights", t, units=False) for t in ("pairs", "experts"))


def _rank_metric(at: int, name: str) -> Metric:
    return EXPERTS(
        lambda w: effective_rank(w[:3][at]),
        f"effective rank of the {name} projection; null: of random entries",
        lambda w: _rank_null(w[:3][at]),
    )


METRICS = {
    "flat_cosine": PAIRS(flat_cosine, "cosine of all weights as one vector; null 0", 0.0),
    "matched_cosine": PAIRS(
        matched_cosine,
        "cosine of the best matched neurons; null: experts of random weights of the same spread",
        _matched_null,
    ),
    "router_cosine": PAIRS(router_cosine, "cosine of the router's rows; null 0", 0.0),
    "effective_rank_gate": _rank_metric(0, "gate"),
    "effective_rank_up": _rank_metric(1, "up"),
    "effective_rank_down": _rank_metric(2, "down"),
}
