"""Sums of how the outputs of one site's experts compare, and the metrics of these.

Shapes: U units, E experts, the shared one last where there is one, N of them, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting
from analysis.overlap.metrics import outputs
from analysis.overlap.metrics.base import Metric, Probe, Sums, UnitSums
from analysis.overlap.metrics.weights import ExpertWeights
from cartmoe.hooks import RouterSite

Experts = list[Callable[[Tensor], Tensor]]  # each x_TD -> (1, T, D)


@dataclass(eq=False)
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

    model: Adapter
    site: RouterSite
    units: int
    _: KW_ONLY
    probe: str = "all"
    minibatch: int = 256
    seed: int = 0

    @torch.no_grad()
    def __post_init__(self) -> None:
        site, key = self.site, (self.seed, self.site.layer, self.site.stage)
        null = ExpertWeights(*self.model.expert_weights(site)).reinitialized(*key, 0)
        ids = range(site.num_experts)
        self._own: Experts = [partial(self.model.expert_outputs, site, ids=[e]) for e in ids]
        self._null: Experts = [partial(outputs.swiglu, null, ids=[e]) for e in ids]
        shared = self.model.shared_weights(site)
        if shared is not None:
            alone = ExpertWeights(*(matrix[None] for matrix in shared))
            self._own.append(partial(outputs.swiglu, alone))
            self._null.append(partial(outputs.swiglu, alone.reinitialized(*key, 1)))
        self.num_experts = len(self._own)
        self._permutations = np.random.default_rng((*key, 2))
        self._sums = UnitSums(self.units)
        self._max_E = torch.zeros(self.num_experts, dtype=torch.float64)

    @torch.no_grad()
    def add(self, probe: Probe) -> None:
        """Add a batch, whose tokens are in a random order."""
        weights_TE = DenseRouting(probe.routing).weights_TE
        weights_TE = nn.pad(weights_TE, (0, self.num_experts - weights_TE.shape[1]), value=1.0)
        for tokens, ids, counts_NN in self._sets(weights_TE != 0):
            for number, some in enumerate(tokens.split(self.minibatch)):
                x_TD = probe.x_TD[some]
                own_NTD = _outputs(self._own, ids, x_TD)
                sums = outputs.expert_sums(own_NTD, weights_TE[some][:, ids])
                sums["max"] = outputs.max_output(own_NTD)
                sums |= _named("own", outputs.pair_sums(own_NTD))
                if number == 0:
                    sums |= _named("null", outputs.pair_sums(_outputs(self._null, ids, x_TD)))
                    sums |= _named("permuted", outputs.hsic_sums(self._permuted(own_NTD)))
                self._add(probe.unit, ids, counts_NN, sums)

    def sums(self) -> Sums:
        """By name (U, ...), and "max" (1, E) over all units: a maximum is no sum."""
        return {**self._sums, "max": self._max_E[None]}

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

    def _permuted(self, outputs_NTD: Tensor) -> Tensor:
        """Each expert's rows in an order of its own."""
        N, T, _ = outputs_NTD.shape
        order_NT = self._permutations.permuted(np.tile(np.arange(T), (N, 1)), axis=1)
        return outputs_NTD[torch.arange(N)[:, None], torch.from_numpy(order_NT)]

    def _add(self, unit: int, ids: list[int], counts_NN: Tensor, sums: dict[str, Tensor]) -> None:
        """Put what counts at its place among all experts."""
        placed = {}
        for name, value in sums.items():
            counts = counts_NN if value.ndim == 2 else counts_NN.diagonal()
            placed[name] = torch.zeros([self.num_experts] * value.ndim, dtype=torch.float64)
            placed[name][np.ix_(*[ids] * value.ndim)] = value.cpu().double().where(counts, 0)
        self._max_E = self._max_E.maximum(placed.pop("max"))
        self._sums.add(unit, **placed)


def _outputs(experts: Experts, ids: list[int], x_TD: Tensor) -> Tensor:
    """(N, T, D)"""
    return torch.cat([experts[e](x_TD) for e in ids])


def _named(part: str, sums: Sums) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for name, value in sums.items()}


PAIRS, EXPERTS = (partial(Metric, "outputs", table) for table in ("pairs", "experts"))


def _of(part: str, function: Callable[[Sums], Tensor]) -> Callable[[Sums], Tensor]:
    """The function of those sums whose names begin so."""
    return lambda sums: function({name.removeprefix(f"{part}."): s for name, s in sums.items()})


def _against_random(function: Callable[[Sums], Tensor], about: str) -> Metric:
    about += "; null: experts with random weights of the same spread on the same tokens"
    return PAIRS(_of("own", function), about, _of("null", function))


METRICS = {
    "cka": _against_random(outputs.cka_of, "debiased linear CKA of outputs"),
    "cka_permuted": PAIRS(
        _of("permuted", outputs.cka_of),
        "control: debiased CKA of outputs of different tokens, each expert's in a random order; "
        "null 0",
        0.0,
    ),
    "output_cosine": _against_random(outputs.cosine_of, "cosine of outputs, mean over tokens"),
    "relative_distance": _against_random(
        outputs.relative_distance_of,
        "root of the mean squared distance of outputs over that of their norms",
    ),
    "output_norm": EXPERTS(
        lambda sums: sums["norm"] / sums["probed"], "norm of the output, mean over tokens; no null"
    ),
    "reap": EXPERTS(
        outputs.reap_of,
        "weight times norm of the output, mean over the tokens routed to it; no null",
    ),
    "max_output": EXPERTS(
        lambda sums: sums["max"][0],
        "largest |output| of any token and dimension; no null and no interval",
        units=False,
    ),
}
