"""What experts have in common in what they compute on the same tokens.

Shapes: U units, E experts, the shared one last where there is one, N of them, T tokens, D model,
F neurons, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting
from analysis.overlap.metrics.base import Metric, Probe, Sums, UnitSums
from analysis.overlap.metrics.cka import biased_cka, cka_of, hsic, hsic_sums, linear_cka
from analysis.overlap.metrics.vectors import (
    cosine,
    cosine_of,
    expert_sums,
    max_output,
    output_norm,
    output_norm_of,
    reap,
    reap_of,
    relative_distance,
    relative_distance_of,
    vector_sums,
)
from analysis.overlap.metrics.weights import ExpertWeights
from cartmoe.hooks import RouterSite

__all__ = [
    "METRICS",
    "OutputStream",
    "biased_cka",
    "cosine",
    "hsic",
    "linear_cka",
    "max_output",
    "output_norm",
    "reap",
    "relative_distance",
    "swiglu",
]


def swiglu(w: ExpertWeights, x_TD: Tensor, ids: list[int] | None = None) -> Tensor:
    """(E, T, D) outputs of all experts, or of those ids, on the same tokens."""
    outputs = []
    for e in range(len(w.gate_EFD)) if ids is None else ids:
        hidden_TF = nn.silu(nn.linear(x_TD, w.gate_EFD[e])) * nn.linear(x_TD, w.up_EFD[e])
        outputs.append(nn.linear(hidden_TF, w.down_EDF[e]))
    return torch.stack(outputs)


class OutputStream:
    """Sums over one site's tokens of how its experts' outputs compare.

    probe      on which tokens: "all"; those "routed" to i, for the pair (i, j); those routed to
               "either" of them. The shared expert, which is the last, has all tokens routed to it,
               at weight 1
    minibatch  tokens of which one HSIC is made; what is left of a batch makes a smaller one, unless
               it is less than 4
    seed       of the null experts, which are as large as the experts, and of the permutations

    Nulls are made from the first minibatch of each batch and set of tokens. The null experts take
    as much memory as the site's experts, once more. Sums take U x E x E fp64 numbers for each of 17
    names, on the CPU: of 32 units and 64 experts 18 MB a site.
    """

    def __init__(
        self,
        model: Adapter,
        site: RouterSite,
        units: int,
        *,
        probe: str = "all",
        minibatch: int = 256,
        seed: int = 0,
    ):
        self.model, self.site, self.probe, self.minibatch = model, site, probe, minibatch
        key = (seed, site.layer, site.stage)
        self._null = ExpertWeights(*_detached(model.expert_weights(site))).reinitialized(*key, 0)
        self._shared = self._null_shared = None
        shared = model.shared_weights(site)
        if shared is not None:
            self._shared = ExpertWeights(*(matrix[None] for matrix in _detached(shared)))
            self._null_shared = self._shared.reinitialized(*key, 1)
        self._permutations = np.random.default_rng((*key, 2))
        self.num_experts = site.num_experts + (shared is not None)
        self._sums = UnitSums(units)
        self._max_E = torch.zeros(self.num_experts, dtype=torch.float64)

    @torch.no_grad()
    def add(self, probe: Probe) -> None:
        """Add a batch, whose tokens are in a random order."""
        weights_TE = DenseRouting(probe.routing).weights_TE
        if self._shared is not None:
            weights_TE = nn.pad(weights_TE, (0, 1), value=1.0)
        for tokens, ids, counts_NN in self._sets(weights_TE != 0):
            for number, some in enumerate(tokens.split(self.minibatch)):
                x_TD = probe.x_TD[some]
                outputs_NTD = self._outputs(x_TD, ids)
                sums = _pair_sums("own", outputs_NTD)
                sums |= expert_sums(outputs_NTD, weights_TE[some][:, ids])
                sums["max"] = max_output(outputs_NTD)
                if number == 0:
                    sums |= _pair_sums("null", self._null_outputs(x_TD, ids))
                    sums |= _named("permuted", hsic_sums(self._permuted(outputs_NTD)))
                self._add(probe.unit, ids, counts_NN, sums)

    def sums(self) -> Sums:
        """By name (U, ...), and "max" (1, E) over all units: a maximum is no sum."""
        return {**self._sums.sums(), "max": self._max_E[None]}

    def _sets(self, used_TE: Tensor) -> Iterator[tuple[Tensor, list[int], Tensor]]:
        """(Numbers of tokens, experts to compare on them, the pairs of these that count); an expert
        by itself counts where the pair (i, i) does. Sets without tokens are left out."""
        E = self.num_experts
        all_ids = list(range(E))
        one_EE = torch.eye(E, dtype=torch.bool)
        if self.probe == "all":
            sets = [(torch.ones_like(used_TE[:, 0]), all_ids, torch.ones_like(one_EE))]
        elif self.probe == "routed":
            sets = [(used_TE[:, i], all_ids, one_EE[:, i, None].expand(E, E)) for i in all_ids]
        else:
            sets = [(used_TE[:, i], [i], one_EE[:1, :1]) for i in all_ids]
            for i, j in combinations(all_ids, 2):
                sets.append((used_TE[:, i] | used_TE[:, j], [i, j], ~one_EE[:2, :2]))
        for used_T, ids, counts_NN in sets:
            tokens = used_T.nonzero()[:, 0]
            if len(tokens):
                yield tokens, ids, counts_NN

    def _outputs(self, x_TD: Tensor, ids: list[int]) -> Tensor:
        experts = partial(self.model.expert_outputs, self.site)
        return _together(experts, self._shared, self.site.num_experts, x_TD, ids)

    def _null_outputs(self, x_TD: Tensor, ids: list[int]) -> Tensor:
        experts = partial(swiglu, self._null)
        return _together(experts, self._null_shared, self.site.num_experts, x_TD, ids)

    def _permuted(self, outputs_NTD: Tensor) -> Tensor:
        """Each expert's rows in an order of its own."""
        N, T, _ = outputs_NTD.shape
        order_NT = self._permutations.permuted(np.tile(np.arange(T), (N, 1)), axis=1)
        return outputs_NTD[torch.arange(N)[:, None], torch.from_numpy(order_NT)]

    def _add(self, unit: int, ids: list[int], counts_NN: Tensor, sums: dict[str, Tensor]) -> None:
        """Put what counts at its place among all experts."""
        E = self.num_experts
        placed = {}
        for name, value in sums.items():
            counts = counts_NN if value.ndim == 2 else counts_NN.diagonal()
            placed[name] = torch.zeros([E] * value.ndim, dtype=torch.float64)
            placed[name][np.ix_(*[ids] * value.ndim)] = value.cpu().double().where(counts, 0)
        self._max_E = self._max_E.maximum(placed.pop("max"))
        self._sums.add(unit, **placed)


def _together(
    experts: Callable[[Tensor, list[int]], Tensor],
    shared: ExpertWeights | None,
    num_experts: int,
    x_TD: Tensor,
    ids: list[int],
) -> Tensor:
    """(N, T, D) outputs of those ids; the shared expert has the one behind the others."""
    routed = [e for e in ids if e < num_experts]
    outputs = [experts(x_TD, routed)] if routed else []
    if shared is not None and num_experts in ids:
        outputs.append(swiglu(shared, x_TD))
    return torch.cat(outputs)


def _detached(matrices: Iterable[Tensor]) -> list[Tensor]:
    return [matrix.detach() for matrix in matrices]


def _pair_sums(of: str, outputs_NTD: Tensor) -> dict[str, Tensor]:
    return _named(of, hsic_sums(outputs_NTD) | vector_sums(outputs_NTD))


def _named(of: str, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{of}.{name}": value for name, value in sums.items()}


def _max_output(sums: Sums) -> Tensor:
    return sums["max"]


def _zero(sums: Sums) -> Tensor:
    return torch.zeros(1)


def _pairs(function: Callable[[Sums], Tensor], of: str) -> Callable[[Sums], Tensor]:
    """The function of those sums whose names begin with `of`."""
    start = f"{of}."
    return lambda sums: function(
        {name.removeprefix(start): s for name, s in sums.items() if name.startswith(start)}
    )


def _pair_metric(function: Callable[[Sums], Tensor], about: str) -> Metric:
    about += "; null: experts with random weights of the same spread on the same tokens"
    return Metric("outputs", "pairs", _pairs(function, "own"), _pairs(function, "null"), about)


METRICS = {
    "cka": _pair_metric(cka_of, "debiased linear CKA of outputs"),
    "cka_permuted": Metric(
        "outputs",
        "pairs",
        _pairs(cka_of, "permuted"),
        _zero,
        "control: debiased CKA of outputs of different tokens, each expert's in a random order; "
        "null 0",
    ),
    "output_cosine": _pair_metric(cosine_of, "cosine of outputs, mean over tokens"),
    "relative_distance": _pair_metric(
        relative_distance_of,
        "root of the mean squared distance of outputs over that of their norms",
    ),
    "output_norm": Metric(
        "outputs", "experts", output_norm_of, None, "norm of the output, mean over tokens; no null"
    ),
    "reap": Metric(
        "outputs",
        "experts",
        reap_of,
        None,
        "weight times norm of the output, mean over the tokens routed to it; no null",
    ),
    "max_output": Metric(
        "outputs",
        "experts",
        _max_output,
        None,
        "largest |output| of any token and dimension; no null and no interval",
        units=False,
    ),
}
