"""Which tokens experts are used for, and together with whom, from the decisions of the real run.

Shapes: U units, E experts, V classes of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from analysis.overlap.metrics.base import Metric, Sums
from analysis.overlap.metrics.chance import (
    chance_co_activation,
    chance_jaccard,
    chance_lift,
    share_of_tokens,
)
from analysis.overlap.metrics.counts import (
    co_activation,
    co_activation_of,
    committee,
    gini,
    jaccard,
    jaccard_of,
    lift,
    lift_of,
    load_entropy,
    loads_of,
    max_vio,
    saturation,
    transition,
    used_mask,
)
from analysis.overlap.metrics.information import (
    class_jaccard,
    conditional_mutual_information,
    js_divergence,
    mutual_information,
    vocabulary_specialization,
)
from analysis.overlap.metrics.usage_stream import UsageStream

__all__ = [
    "METRICS",
    "UsageStream",
    "class_jaccard",
    "co_activation",
    "committee",
    "conditional_mutual_information",
    "gini",
    "jaccard",
    "js_divergence",
    "lift",
    "load_entropy",
    "max_vio",
    "mutual_information",
    "saturation",
    "transition",
    "used_mask",
    "vocabulary_specialization",
]

NOTHING = torch.tensor([math.nan], dtype=torch.float64)
NO_TASTE = "null: experts without a taste in company (quasi-independence, Goodman 1968)"
OTHER_TOKENS = "null: token labels of other documents, NaN where there is one document"
OTHER_DOMAINS = "null: domains of other documents, NaN where there is one domain"
TOTALS = "no interval, as classes are not kept by unit"


def _loads(sums: Sums) -> Tensor:
    return loads_of(sums["pairs"])


def _load(sums: Sums) -> Tensor:
    return _loads(sums) / _loads(sums).sum(-1, keepdim=True)


def _routed_weight(sums: Sums) -> Tensor:
    return sums["weight"] / sums["weight"].sum(-1, keepdim=True)


def _lift(sums: Sums) -> Tensor:
    return lift_of(sums["pairs"], sums["tokens"][:, None, None])


def _transition(sums: Sums) -> Tensor:
    return sums["transition"] / sums["before"][..., None]


def _domain_specialization(sums: Sums) -> Tensor:
    return sums["domains"] / sums["domain_tokens"][:, None]


def _router_entropy(sums: Sums) -> Tensor:
    return sums["entropy"] / sums["tokens"] / math.log(_experts(sums))


def _used_experts(sums: Sums) -> Tensor:
    """(U,) mean number of experts that a token uses."""
    return share_of_tokens(sums).sum(-1)


def _experts(sums: Sums) -> int:
    return sums["pairs"].shape[-1]


def _always(value: float) -> Callable[[Sums], Tensor]:
    return lambda sums: torch.tensor([value], dtype=torch.float64)


def _even_share(sums: Sums) -> Tensor:
    return torch.tensor([1 / _experts(sums)], dtype=torch.float64)


def _of_other_domains(found_UR: Tensor, sums: Sums) -> Tensor:
    """The mean over shuffles; NaN where there is no second domain, so that they change nothing."""
    return found_UR.mean(-1) if sums["domain_tokens"].shape[-1] > 1 else NOTHING


def _metric(
    table: str,
    of: Callable[[Sums], Tensor],
    null: Callable[[Sums], Tensor] | None,
    about: str,
    units: bool = True,
) -> Metric:
    return Metric("usage", table, of, null, about, units)


def _of_classes(table: str, function: Callable[[Tensor, Tensor], Tensor], about: str) -> Metric:
    """A function of (classes (E, V), class_tokens (V,)); its null is the mean over shuffles, NaN
    where there are none."""

    def of(sums: Sums) -> Tensor:
        return function(sums["classes"][0], sums["class_tokens"][0])[None]

    def null(sums: Sums) -> Tensor:
        others = zip(sums["other_classes"][0], sums["other_class_tokens"][0], strict=True)
        found = [function(*other) for other in others]
        return torch.stack(found).mean(0, keepdim=True) if found else NOTHING

    return _metric(table, of, null, f"{about}; {OTHER_TOKENS}; {TOTALS}", units=False)


METRICS = {
    "co_activation": _metric(
        "pairs",
        lambda sums: co_activation_of(sums["pairs"]),
        chance_co_activation,
        "of the tokens that use i, the share that uses j too (OLMoE, arXiv 2409.02060, eq. 6); "
        f"{NO_TASTE}",
    ),
    "lift": _metric(
        "pairs",
        _lift,
        chance_lift,
        f"P_ij / (P_i P_j) of using i and j; {NO_TASTE}, below 1",
    ),
    "jaccard": _metric(
        "pairs",
        lambda sums: jaccard_of(sums["pairs"]),
        chance_jaccard,
        f"of the tokens that use i or j, the share that uses both; {NO_TASTE}",
    ),
    "transition": _metric(
        "pairs",
        _transition,
        share_of_tokens,
        "of the tokens that use i at the site before, the share that uses j at this one; null: j's "
        "share of all tokens",
    ),
    "token_jaccard": _of_classes(
        "pairs",
        lambda counts_EV, _: class_jaccard(counts_EV),
        "of the token ids that i or j is ever used for, the share that both are",
    ),
    "token_js": _of_classes(
        "pairs",
        lambda counts_EV, _: js_divergence(counts_EV),
        "Jensen-Shannon divergence of the distributions of token ids that i and j are used for, "
        "nats",
    ),
    "load": _metric("experts", _load, _even_share, "share of the used slots; null 1 / E"),
    "routed_weight": _metric(
        "experts", _routed_weight, _even_share, "share of the weight of all slots; null 1 / E"
    ),
    "domain_specialization": _metric(
        "experts",
        _domain_specialization,
        lambda sums: share_of_tokens(sums)[..., None],
        "of a domain's tokens, the share that uses the expert (OLMoE, arXiv 2409.02060, eq. 7); "
        "null: the share over all domains",
    ),
    "vocabulary_specialization": _of_classes(
        "experts",
        vocabulary_specialization,
        "of the tokens of one id, the share that uses the expert (OLMoE, arXiv 2409.02060, eq. 8), "
        "mean over the tokens that use it",
    ),
    "load_entropy": _metric(
        "sites",
        lambda sums: load_entropy(_loads(sums)),
        _always(1.0),
        "entropy of the loads / log E; null 1, even loads",
    ),
    "max_vio": _metric(
        "sites",
        lambda sums: max_vio(_loads(sums)),
        _always(0.0),
        "largest load over the mean, less 1 (MaxVio, arXiv 2408.15664); null 0, even loads",
    ),
    "gini": _metric(
        "sites",
        lambda sums: gini(_loads(sums)),
        _always(0.0),
        "Gini coefficient of the loads; null 0, even loads",
    ),
    "router_entropy": _metric(
        "sites",
        _router_entropy,
        None,
        "entropy of a token's scores as a distribution / log E, mean over tokens; no null",
    ),
    "committee": _metric(
        "sites",
        lambda sums: committee(sums["weight"], _used_experts(sums)),
        lambda sums: _used_experts(sums) / _experts(sums),
        "share of all weight that the k most weighted experts have, k being the mean number that a "
        "token uses (standing committee, arXiv 2601.03425); null k / E, even weights",
    ),
    "mi_domain": _metric(
        "sites",
        lambda sums: mutual_information(sums["domains"]),
        lambda sums: _of_other_domains(mutual_information(sums["other_domains"]), sums),
        f"I(expert; domain) of a use, nats, Miller-Madow; {OTHER_DOMAINS}",
    ),
    "mi_token": _metric(
        "sites",
        lambda sums: mutual_information(sums["classes"]),
        lambda sums: mutual_information(sums["other_classes"]).mean(-1),
        f"I(expert; token id) of a use, nats, Miller-Madow; {OTHER_TOKENS}; {TOTALS}",
        units=False,
    ),
    "mi_domain_given_token": _metric(
        "sites",
        lambda sums: sums["mi_domain_given_token"],
        lambda sums: _of_other_domains(sums["other_mi_domain_given_token"], sums),
        f"I(expert; domain | token id) of a use, nats, Miller-Madow; {OTHER_DOMAINS}; {TOTALS}",
        units=False,
    ),
}
