"""Which part of a changed decision is let through.

Shapes: T tokens, E experts, K slots. R is the router's own decision, R' the one under the
perturbation; both list experts best first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch

from analysis.doses import DenseRouting
from analysis.perturb.decisions import fit
from cartmoe.routing import EPS, Router, Routing


def _full(clean: Routing, changed: Routing, router: Router) -> Routing:
    """R' as it is."""
    return changed


def _selection(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R', by rank with the sorted clean weights, as many as both have."""
    by_rank_TK = clean.weights_TK.sort(-1, descending=True).values
    weights_TK = torch.where(
        changed.weights_TK != 0, fit(by_rank_TK, changed.weights_TK.shape[-1]), 0
    )
    return changed._replace(weights_TK=weights_TK)


def _weights(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R with the weights that the perturbed scores give them, or, where it was not the
    scores that were perturbed, the weights that they have in R'."""
    if changed.scores_TE is clean.scores_TE:
        weights_TK = DenseRouting(changed).weights_TE.gather(-1, clean.ids_TK)
    else:
        weights_TK = changed.scores_TE.gather(-1, clean.ids_TK)
        # Not router.weigh: with top_p it would also choose how many of R to use.
        weights_TK = weights_TK * (clean.weights_TK != 0)
        if router.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=EPS)
    return changed._replace(ids_TK=clean.ids_TK, weights_TK=weights_TK)


def _no_refill(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R that are also in R', with their clean weights; nothing for the others."""
    kept_TK = clean.weights_TK * DenseRouting(changed).used_TE.gather(-1, clean.ids_TK)
    return changed._replace(ids_TK=clean.ids_TK, weights_TK=kept_TK)


def _part(parts: frozenset[str], clean: Routing, changed: Routing, router: Router) -> Routing:
    """The `parts` of R', everything else of R: their damages are what Shapley values divide.

    set      which experts are used
    weights  how the routed weight is divided among them: by rank, as shares of the whole; of R'
             on the set of R the shares that effect "weights" gives
    mass     the sum of the routed weights
    All three parts make R', none makes R.
    """
    if "set" in parts:
        ids_TK, own_TK = changed.ids_TK, changed.weights_TK
        if "weights" not in parts:
            by_rank_TK = clean.weights_TK.sort(-1, descending=True).values
            # Ranks of R' by its own weights, so that the largest share goes to its first choice.
            rank_TK = own_TK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            by_rank_TK = fit(by_rank_TK, own_TK.shape[-1]).gather(-1, rank_TK)
            own_TK = torch.where(own_TK != 0, by_rank_TK, 0)
    else:
        source = _weights(clean, changed, router) if "weights" in parts else clean
        ids_TK, own_TK = clean.ids_TK, source.weights_TK
    total_T1 = (changed if "mass" in parts else clean).weights_TK.sum(-1, keepdim=True)
    scale_T1 = total_T1 / own_TK.sum(-1, keepdim=True).clamp(min=EPS)
    return changed._replace(ids_TK=ids_TK, weights_TK=own_TK * scale_T1)


PARTS = ("set", "weights", "mass")
# Every proper coalition of them: "part set", "part set+weights", ...
COALITIONS = {
    f"part {'+'.join(some)}": frozenset(some)
    for size in range(1, len(PARTS))
    for some in combinations(PARTS, size)
}

EFFECTS: dict[str, Callable[[Routing, Routing, Router], Routing]] = {
    "full": _full,
    "selection": _selection,
    "weights": _weights,
    "no_refill": _no_refill,
} | {name: partial(_part, parts) for name, parts in COALITIONS.items()}
