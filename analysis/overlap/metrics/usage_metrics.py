"""Metrics of which tokens experts are used for, and with whom, from the sums of `UsageStream`.

Shapes: U units, E experts, V classes of tokens, R shuffles of labels over documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from analysis.overlap.metrics import usage
from analysis.overlap.metrics.base import Metric, Sums

PAIRS, EXPERTS, SITES = (partial(Metric, "usage", table) for table in ("pairs", "experts", "sites"))
ROUNDS = 200  # of the fit; slowest, within 1 % then, is one expert that is in all company
OWN, OTHERS = slice(1), slice(1, None)  # of the ways to label tokens
NOTHING = torch.tensor(math.nan, dtype=torch.float64)
NO_TASTE = "null: experts without a taste in company (quasi-independence, Goodman 1968)"
OTHER_TOKENS = "null: token labels of other documents, NaN where there is one document"
OTHER_DOMAINS = "null: domains of other documents, NaN where there is one domain"
TOTALS = "no interval, as classes are not kept by unit"


def _loads(sums: Sums) -> Tensor:
    return usage.loads_of(sums["both"])


def _share_of_tokens(sums: Sums) -> Tensor:
    """(U, E) f: the share of tokens that use the expert."""
    return _loads(sums) / sums["tokens"][:, None]


def _by_chance(sums: Sums) -> tuple[Tensor, Tensor]:
    """What pairs of experts would have in common if no expert had a taste in company.

    Quasi-independence (Goodman, JASA 63, 1968): P_ij = a_i a_j for i != j, with the a for which
    each expert meets as many others as it does, sum_{j != i} P_ij = c_i. Independence would give
    f_i f_j, which k experts of E drawn without replacement do not reach.

    (U, E, E) P_ij, at most the smaller of both shares, which the fit may just pass; (U, E) f.
    """
    f_UE = _share_of_tokens(sums)
    met_UEE = sums["both"] / sums["tokens"][:, None, None]
    company_UE = met_UEE.sum(-1) - f_UE  # c: the diagonal is f
    a_UE = company_UE / _positive(company_UE.sum(-1, keepdim=True)).sqrt()
    for _ in range(ROUNDS):  # to a (sum(a) - a) = c
        others_UE = a_UE.sum(-1, keepdim=True) - a_UE
        a_UE = (a_UE * company_UE / _positive(others_UE)).sqrt()
    both_UEE = a_UE[..., None] * a_UE[..., None, :]
    return both_UEE.minimum(torch.minimum(f_UE[..., None], f_UE[..., None, :])), f_UE


def _positive(x: Tensor) -> Tensor:
    """Divisors: nobody's company is 0 / 0, and counts as 0."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _used_experts(sums: Sums) -> Tensor:
    """(U,) mean number of experts that a token uses."""
    return _share_of_tokens(sums).sum(-1)


def _experts(sums: Sums) -> int:
    return sums["both"].shape[-1]


def _even(sums: Sums) -> Tensor:
    """(1,) the share of each expert if all have the same."""
    return torch.tensor([1 / _experts(sums)], dtype=torch.float64)


def _company(function: Callable[..., Tensor], about: str) -> Metric:
    """A function of how many tokens use both, one, and there are."""

    def of(sums: Sums) -> Tensor:
        return function(sums["both"], _loads(sums), sums["tokens"][:, None, None])

    return PAIRS(of, about, lambda sums: function(*_by_chance(sums), 1))


def _of_loads(function: Callable[[Tensor], Tensor], about: str, null: float) -> Metric:
    return SITES(lambda sums: function(_loads(sums)), about, null)


def _of_classes(
    table: Callable[..., Metric], function: Callable[[Tensor, Tensor], Tensor], about: str
) -> Metric:
    """The mean over ways to label tokens of a function of (classes (E, V), class_tokens (V,)): of
    the tokens' own, and as its null of all others, NaN where there are none."""

    def mean(sums: Sums, ways: slice) -> Tensor:
        own = zip(sums["classes"][0, ways], sums["class_tokens"][0, ways], strict=True)
        found = [function(*counts) for counts in own]
        return torch.stack(found).mean(0) if found else NOTHING

    of, null = (partial(mean, ways=ways) for ways in (OWN, OTHERS))
    return table(of, f"{about}; {OTHER_TOKENS}; {TOTALS}", null, units=False)


def _of_other_domains(found_UR: Tensor, sums: Sums) -> Tensor:
    """The mean over shuffles; NaN where there is no second domain, so that they change nothing."""
    return found_UR.mean(-1) if sums["domain_tokens"].shape[-1] > 1 else NOTHING


METRICS = {
    "co_activation": _company(
        usage.co_activation_of,
        "of the tokens that use i, the share that uses j too (OLMoE, arXiv 2409.02060, eq. 6); "
        f"{NO_TASTE}",
    ),
    "lift": _company(usage.lift_of, f"P_ij / (P_i P_j) of using i and j; {NO_TASTE}, below 1"),
    "jaccard": _company(
        usage.jaccard_of, f"of the tokens that use i or j, the share that uses both; {NO_TASTE}"
    ),
    "transition": PAIRS(
        lambda sums: sums["transition"] / sums["before"][..., None],
        "of the tokens that use i at the site before, the share that uses j at this one; null: j's "
        "share of all tokens",
        _share_of_tokens,
    ),
    "token_jaccard": _of_classes(
        PAIRS,
        lambda classes_EV, _: usage.class_jaccard(classes_EV),
        "of the token ids that i or j is ever used for, the share that both are",
    ),
    "token_js": _of_classes(
        PAIRS,
        lambda classes_EV, _: usage.js_divergence(classes_EV),
        "Jensen-Shannon divergence of the distributions of token ids that i and j are used for, "
        "nats",
    ),
    "load": EXPERTS(
        lambda sums: usage.share(_loads(sums)), "share of the used slots; null 1 / E", _even
    ),
    "routed_weight": EXPERTS(
        lambda sums: usage.share(sums["weight"]),
        "share of the weight of all slots; null 1 / E",
        _even,
    ),
    "domain_specialization": EXPERTS(
        lambda sums: sums["domains"] / sums["domain_tokens"][:, None],
        "of a domain's tokens, the share that uses the expert (OLMoE, arXiv 2409.02060, eq. 7); "
        "null: the share over all domains",
        lambda sums: _share_of_tokens(sums)[..., None],
    ),
    "vocabulary_specialization": _of_classes(
        EXPERTS,
        usage.vocabulary_specialization,
        "of the tokens of one id, the share that uses the expert (OLMoE, arXiv 2409.02060, eq. 8), "
        "mean over the tokens that use it",
    ),
    "load_entropy": _of_loads(
        usage.load_entropy, "entropy of the loads / log E; null 1, even loads", 1.0
    ),
    "max_vio": _of_loads(
        usage.max_vio,
        "largest load over the mean, less 1 (MaxVio, arXiv 2408.15664); null 0, even loads",
        0.0,
    ),
    "gini": _of_loads(usage.gini, "Gini coefficient of the loads; null 0, even loads", 0.0),
    "router_entropy": SITES(
        lambda sums: sums["entropy"] / sums["tokens"] / math.log(_experts(sums)),
        "entropy of a token's scores as a distribution / log E, mean over tokens; no null",
    ),
    "committee": SITES(
        lambda sums: usage.committee(sums["weight"], _used_experts(sums)),
        "share of all weight that the k most weighted experts have, k being the mean number that a "
        "token uses (standing committee, arXiv 2601.03425); null k / E, even weights",
        lambda sums: _used_experts(sums) / _experts(sums),
    ),
    "mi_domain": SITES(
        lambda sums: usage.mutual_information(sums["domains"]),
        f"I(expert; domain) of a use, nats, Miller-Madow; {OTHER_DOMAINS}",
        lambda sums: _of_other_domains(usage.mutual_information(sums["other_domains"]), sums),
    ),
    "mi_token": SITES(
        lambda sums: usage.mutual_information(sums["classes"][0, 0]),
        f"I(expert; token id) of a use, nats, Miller-Madow; {OTHER_TOKENS}; {TOTALS}",
        lambda sums: usage.mutual_information(sums["classes"][0, OTHERS]).mean(-1),
        units=False,
    ),
    "mi_domain_given_token": SITES(
        lambda sums: sums["mi_domain_given_token"][0, 0],
        f"I(expert; domain | token id) of a use, nats, Miller-Madow; {OTHER_DOMAINS}; {TOTALS}",
        lambda sums: _of_other_domains(sums["mi_domain_given_token"][0, OTHERS], sums),
        units=False,
    ),
}
