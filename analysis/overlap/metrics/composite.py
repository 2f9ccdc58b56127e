"""How far composed experts of a Cartesian layer are from additive, and how much alike they are.

How far o_ij (composed.py) is from additive is the interaction of a two-way analysis
of variance over (i, j); of B fed the mean of v over i it is 0, and what A and B then are is their
null.

Shapes: U units, T tokens, D model, A and B experts of the two stages, P pairs of them (i, j), N
sets of tokens that enter B, R relations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters import Adapter
from analysis.overlap.metrics.base import Metric, Probe, Sums, UnitSums
from analysis.overlap.metrics.composed import Block, Layer, wide
from analysis.overlap.metrics.cores import on_cores
from analysis.overlap.metrics.outputs import cosines, hsic_sums
from analysis.overlap.metrics.usage import share
from cartmoe.hooks import RouterSite

TOKENS = 1024  # of a batch that are used, drawn at random: P outputs of each are dear
BLOCK_ROWS = 1024  # that an expert of B runs at once, so that temporaries stay in cache
PAIR_TOKENS = 64  # of a batch (to whole blocks) that pairs are compared and the null is taken on
PAIR_EXPERTS = 16  # the first of each stage, that are compared: P x P numbers are kept a unit
PARTS = {"a": "A's main effect", "b": "B's main effect", "interaction": "what is not additive"}
RELATIONS = {
    "row": "have the same a_i",
    "column": "have the same b_j",
    "unrelated": "share neither",
}
UNRELATED = list(RELATIONS).index("unrelated")


def two_way(outputs_ABTD: Tensor) -> Tensor:
    """(3,) fp64 sums of squares of A (over i), B (over j) and interaction, about each token's grand
    mean; they add up to the total."""
    y_ABTD = outputs_ABTD.double() - outputs_ABTD.double().mean((0, 1))
    A, B = y_ABTD.shape[:2]
    a_ATD, b_BTD = y_ABTD.mean(1), y_ABTD.mean(0)
    rest_ABTD = y_ABTD - a_ATD[:, None] - b_BTD
    return torch.stack([B * _square(a_ATD), A * _square(b_BTD), _square(rest_ABTD)])


def mean_cosines(outputs_ABTD: Tensor) -> Tensor:
    """(R, T) mean cosine of two composed experts' outputs about the token's mean of those that are
    given: of two that share a row (the same a_i), a column (the same b_j), nothing."""
    A, B = outputs_ABTD.shape[:2]
    outputs_ABTD = wide(outputs_ABTD)
    n_ABTD = F.normalize(outputs_ABTD - outputs_ABTD.mean((0, 1)), dim=-1)
    n_ATD, n_BTD = n_ABTD.sum(1), n_ABTD.sum(0)
    own_T, row_T = n_ABTD.square().sum((0, 1, 3)), n_ATD.square().sum((0, 2))
    column_T, all_T = n_BTD.square().sum((0, 2)), n_ATD.sum(0).square().sum(-1)
    sums_RT = torch.stack([row_T - own_T, column_T - own_T, all_T - row_T - column_T + own_T])
    counts_R1 = A * B * sums_RT.new_tensor([[B - 1], [A - 1], [(A - 1) * (B - 1)]])
    return sums_RT / counts_R1


def tokens_for(metrics: Iterable[str]) -> int:
    """How many of a batch these metrics need."""
    return PAIR_TOKENS if {f"composite_{part}" for part in PARTS}.isdisjoint(metrics) else TOKENS


class CompositeStream:
    """Sums for the metrics below over the tokens of one two-stage layer; of fixed size. `tokens` of
    a batch are used (see `tokens_for`).

    Shares of squares are of all composed experts. Pairs (cosine and CKA) are of those of the first
    16 experts of each stage: with more than 16, the order of experts decides which these are.
    """

    def __init__(
        self,
        model: Adapter,
        first: RouterSite,
        second: RouterSite,
        units: int,
        tokens: int = TOKENS,
    ):
        self._layer, self._sums = Layer(model, first, second), UnitSums(units)
        self._tokens = tokens

    @torch.no_grad()
    def add(self, probe: Probe) -> None:
        """Add a batch; the probe is that of the first stage."""
        u_TD = probe.stream_TD[: self._tokens]
        a_ATD = self._layer.first_outputs(u_TD)
        (A, T, D), B = a_ATD.shape, self._layer.second.num_experts
        step = max(1, BLOCK_ROWS // A)
        few = min(T, -(-PAIR_TOKENS // step) * step)
        pairs_ABTD = wide(u_TD.new_empty(min(A, PAIR_EXPERTS), min(B, PAIR_EXPERTS), few, D))

        def measure(start: int) -> dict[str, Tensor]:
            some = slice(start, start + step)
            block = self._layer.block(u_TD[some], a_ATD[:, some], with_mean=start < few)
            if start >= few:
                return dict(squares=_squares(block)[1])
            last_BTD, squares_3 = _squares(block, pairs_ABTD[:, :, some])
            null_2 = _effects(wide(a_ATD[:, some]), last_BTD)
            return dict(squares=squares_3, null=F.pad(null_2, (0, 1)))

        for sums in on_cores(measure, range(0, T, step)):
            self._sums.add(probe.unit, **sums)
        cosine_R = mean_cosines(pairs_ABTD).double().sum(1)
        hsic_PP = hsic_sums(pairs_ABTD.flatten(0, 1))["ij"]
        self._sums.add(probe.unit, cosine=cosine_R, tokens=torch.tensor(few), hsic=hsic_PP)

    def sums(self) -> Sums:
        """squares (U, 3) and null (U, 3) of `PARTS`; cosine (U, R), tokens (U,); hsic (U, P, P),
        HSIC_1 times tokens."""
        return self._sums


class SecondStage:
    """The same layer as its second stage sees it, whose experts come first in pairs."""

    def __init__(self, layer: CompositeStream):
        self._layer = layer

    def add(self, probe: Probe) -> None:
        """Nothing: the first stage has added the batch."""

    def sums(self) -> Sums:
        """hsic (U, P, P), of pairs (j, i)."""
        hsic_UPP = self._layer.sums()["hsic"]
        return {"hsic": _by_expert(hsic_UPP).permute(0, 2, 1, 4, 3).reshape(hsic_UPP.shape)}


def _squares(block: Block, outputs_ABTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, T, D) routed parts of the last row (of the mean, where it is fed), and (3,) `two_way` of
    all composed outputs; those of the first experts are written to `outputs_ABTD`. At least fp32.

    One expert j at a time; with q_j that routed part, o_ij = rows_i + q_j + e_ij, and the
    interaction is that of the small e, so that no digits are lost.
    """
    A, B = len(block.rows_ATD), len(block.experts[0])
    row_ATD = torch.zeros_like(block.rows_ATD)
    square = row_ATD.new_zeros((), dtype=torch.float64)
    q_BTD, column_BTD = row_ATD.new_empty(2, B, *row_ATD.shape[1:])
    for j in range(B):
        routed_NTD = wide(block.routed(j))
        if outputs_ABTD is not None and j < outputs_ABTD.shape[1]:
            rows = slice(len(outputs_ABTD))
            torch.add(block.rows_ATD[rows], routed_NTD[:A][rows], out=outputs_ABTD[:, j])
        q_BTD[j] = routed_NTD[-1]
        e_ATD = routed_NTD[:A].sub_(q_BTD[j])
        row_ATD[: len(e_ATD)].add_(e_ATD)  # one row of 0 in a parallel layer
        torch.sum(e_ATD, 0, out=column_BTD[j])
        square += _square(e_ATD)
    row_ATD, column_BTD = row_ATD / B, column_BTD / A
    main_2 = _effects(block.rows_ATD + row_ATD, q_BTD + column_BTD)
    additive = B * _square(row_ATD) + A * _square(column_BTD) - A * B * _square(row_ATD.mean(0))
    return q_BTD, torch.stack([*main_2, square - additive])


def _effects(a_ATD: Tensor, b_BTD: Tensor) -> Tensor:
    """(2,) sums of squares of A and B over all i and j."""
    a_ATD, b_BTD = a_ATD - a_ATD.mean(0), b_BTD - b_BTD.mean(0)
    return torch.stack([len(b_BTD) * _square(a_ATD), len(a_ATD) * _square(b_BTD)])


def _square(x: Tensor) -> Tensor:
    """Sum of squares as fp64, summed in the dtype of x: one pass without temporaries."""
    return torch.dot(x.flatten(), x.flatten()).double()


def related(num_experts: int) -> Tensor:
    """(R, P, P) which pairs of composed experts share a row, a column, nothing."""
    same = torch.eye(num_experts, dtype=torch.bool)
    row_PP = same.repeat_interleave(num_experts, 0).repeat_interleave(num_experts, 1)
    column_PP = same.repeat(num_experts, num_experts)
    return torch.stack([row_PP & ~column_PP, column_PP & ~row_PP, ~row_PP & ~column_PP])


def _by_expert(pairs_UPP: Tensor) -> Tensor:
    """(U, i, j, i', j'); both stages have as many experts."""
    experts = round(pairs_UPP.shape[-1] ** 0.5)
    return pairs_UPP.view(-1, *[experts] * 4)


def _share(sums: Sums, part: int, of: str) -> Tensor:
    return share(sums[of])[:, part]


def _cosine(sums: Sums, relation: int) -> Tensor:
    return sums["cosine"][:, relation] / sums["tokens"]


def _cka(sums: Sums, relation: int) -> Tensor:
    cka_UPP = cosines(sums["hsic"])
    return cka_UPP[:, related(round(cka_UPP.shape[-1] ** 0.5))[relation]].mean(-1)


def _experts_cka(sums: Sums) -> Tensor:
    """(U, i, i') means over j = j'."""
    return _by_expert(cosines(sums["hsic"])).diagonal(dim1=2, dim2=4).mean(-1)


PAIRS, SITES = (partial(Metric, "composite", table) for table in ("pairs", "sites"))


def _share_metric(part: int, what: str) -> Metric:
    about = (
        f"share of {what} in the squares of composed outputs about their mean; null: the same of B "
        "fed the mean over A's experts"
    )
    of, null = (partial(_share, part=part, of=of) for of in ("squares", "null"))
    return SITES(of, about, null)


def _relation_metrics(name: str, of: Callable[..., Tensor], measure: str) -> dict[str, Metric]:
    few = f"those of the first {PAIR_EXPERTS} experts of each stage"
    metrics = {}
    for number, (relation, which) in enumerate(RELATIONS.items()):
        about = f"{measure} of composed experts that {which}, {few}"
        null = None if number == UNRELATED else partial(of, relation=UNRELATED)
        about += "; null: of those that share neither" if null else ""
        metrics[f"{name}_{relation}"] = SITES(partial(of, relation=number), about, null)
    return metrics


METRICS = {
    **{f"composite_{name}": _share_metric(part, PARTS[name]) for part, name in enumerate(PARTS)},
    **_relation_metrics("composite_cka", _cka, "mean debiased CKA"),
    **_relation_metrics(
        "composite_cosine", _cosine, "mean cosine, about the token's mean of these,"
    ),
    "composite_cka": PAIRS(
        _experts_cka,
        "mean debiased CKA of composed experts that differ in these two of one stage alone, over "
        f"the other's experts; of stages of at most {PAIR_EXPERTS} experts, the first of which is "
        "among the sites; null: of those that share neither",
        partial(_cka, relation=UNRELATED),
    ),
}
