"""What the tests of perturbations share: decisions of one router and of whole models."""

import torch

from analysis.measure.intervene import perturbed
from analysis.perturb.base import chosen_mask
from analysis.perturb.condition import Condition
from cartmoe.hooks import capture_routing
from cartmoe.routing import Router, Routing

# Kinds of models, as in conftest.
KINDS = ["smoe", "smoe_share", "hash", "fine_grained", "top_p", "cartesian", "parallel", "sigmoid"]
KINDS += ["top1", "raw"]
RENORMALIZED = ["smoe", "smoe_share", "hash", "fine_grained", "cartesian", "parallel", "sigmoid"]
# Options of a single router.
OPTIONS = [{}, dict(top_p=0.4, renormalize=False), dict(renormalize=False), dict(score="sigmoid")]

TOKENS_BL = torch.randint(1, 13, (6, 8), generator=torch.Generator().manual_seed(1))
IDS_B = torch.tensor([4, 8, 15, 16, 23, 42])


def routings(model, p, tokens_BL=TOKENS_BL, ids_B=IDS_B, **options):
    """(output, decisions by site) under the perturbation."""
    with (
        perturbed(model, p, sequence_ids=ids_B, **options),
        capture_routing(model.model) as captured,
        torch.no_grad(),
    ):
        out = model.model(tokens_BL)
    return out, {site: routing for site, (routing,) in captured.items()}


def decide(router, p, logits_TE, context, point="logits", effect="full", stats=None):
    """(decision without, decision with)"""
    clean, ctx = context(router, logits_TE, stats=stats)
    return clean, Condition(p, point=point, effect=effect).apply(clean, router, ctx)


def router_of(E=6, K=2, bias=None, **options) -> Router:
    """Without a gate."""
    router = Router(None, E, K, **options)
    if bias is not None:
        router.selection_bias_E.copy_(torch.tensor(bias))
    return router


def same_sets(a: Routing, b: Routing) -> torch.Tensor:
    """(T,) whether both use the same experts."""
    return (chosen_mask(a) == chosen_mask(b)).all(-1)


def hooks_of(model) -> dict[str, list]:
    """Every hook of every module, and what instances have in the place of methods."""
    return {
        f"{name}.{kind}": list(value.values()) if kind.endswith("_hooks") else [value]
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if (kind.endswith("_hooks") and value) or kind in ("forward", "__call__")
    }
