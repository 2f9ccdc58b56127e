"""What pictures and tables have to know of a metric of overlap beside its numbers."""

from __future__ import annotations

from typing import NamedTuple


class Facts(NamedTuple):
    """Of a metric that is not listed: its name, and none of the rest."""

    label: str  # at an axis or a bar of colors
    apart: bool = False  # the more of it, the less in common
    across: bool = False  # its pairs are of the experts of two sites
    ratio: bool = False  # its null is in the middle of a log scale


RELATIONS = ("row", "column", "unrelated")  # what two composed experts share
FACTS = {
    "cka": Facts("debiased CKA of outputs"),
    "composite_cka": Facts("CKA of composed experts"),
    "cka_permuted": Facts("debiased CKA, tokens permuted"),
    "co_activation": Facts("co-activation P(j|i)"),
    "lift": Facts("lift of joint choice", ratio=True),
    "token_jaccard": Facts("Jaccard of token sets"),
    "token_js": Facts("Jensen-Shannon div. of tokens", apart=True),
    "flat_cosine": Facts("cosine of weights"),
    "matched_cosine": Facts("matched cosine of weights"),
    "router_cosine": Facts("cosine of router rows"),
    "output_cosine": Facts("cosine of outputs"),
    "relative_distance": Facts("relative distance of outputs", apart=True),
    "substitution": Facts("rise of loss (nats per routed token)", apart=True),
    "transition": Facts("P(j|i)", across=True),
    "jaccard": Facts("Jaccard of joint choice"),
    "mi_domain": Facts("I(expert; domain), nats"),
    "mi_token": Facts("I(expert; token), nats"),
    "mi_domain_given_token": Facts("I(expert; domain | token), nats"),
    "domain_specialization": Facts("share of the domain's tokens"),
    "max_vio": Facts("MaxVio"),
    "gini": Facts("Gini coefficient of loads"),
    "committee": Facts("weight of the standing committee"),
    "removal_linear": Facts("removal, to first order (nats)"),
    "reap": Facts("REAP's score"),
    "composite_a": Facts("share of A in composed outputs"),
    "composite_b": Facts("share of B in composed outputs"),
    "composite_interaction": Facts("share of the interaction in composed outputs"),
    **{f"composite_cka_{r}": Facts(f"CKA of composed experts, {r}") for r in RELATIONS},
    **{f"composite_cosine_{r}": Facts(f"cosine of composed experts, {r}") for r in RELATIONS},
}


def facts_of(metric: str) -> Facts:
    """Of any metric by its name."""
    return FACTS.get(metric, Facts(metric.replace("_", " ")))
