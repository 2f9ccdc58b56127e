"""Which part of a changed decision is let through.

Shapes: T tokens, E experts, K slots. R is the router's own decision, R' the one under the
perturbation; both list experts best first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from analysis.adapters import DenseRouting, Router
from analysis.perturb.decisions import fit
from cartmoe.routing import EPS, Routing


def _full(clean: Routing, changed: Routing, router: Router) -> Routing:
    """R' as it is."""
    return changed


def _selection(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R', by rank with the sorted clean weights, as many as both have."""
    return changed._replace(weights_TK=_dealt(clean.weights_TK, changed.weights_TK))


def _dealt(weights_TK: Tensor, to_TK: Tensor) -> Tensor:
    """Weights dealt to the used slots of another decision: the highest to the slot that has the
    highest there. (Slots stand in the order of choice, which with a bias is not that of weights,
    and a slot that is not used may be the first.)"""
    rank_TK = to_TK.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    sorted_TK = weights_TK.sort(-1, descending=True).values
    dealt_TK = fit(sorted_TK, to_TK.shape[-1]).gather(-1, rank_TK)
    return torch.where(to_TK != 0, dealt_TK, 0)


def _made_by_scores(clean: Routing, changed: Routing, router: Router) -> bool:
    """Whether R' has the weights that perturbed scores give: no part of a Compose moved them."""
    if changed.scores_TE is clean.scores_TE:
        return False
    own_rule = clean.ids_TK.shape == changed.ids_TK.shape
    used_TK = None if own_rule else torch.ones_like(changed.ids_TK, dtype=torch.bool)
    made_TK = router.weigh(changed.scores_TE, changed.ids_TK, used_TK)
    return torch.equal(made_TK, changed.weights_TK)


def _weights(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R with the weights that the perturbed scores give them, or, where it was not the
    scores that were perturbed, the weights that they have in R'."""
    used_TK = clean.weights_TK != 0
    if _made_by_scores(clean, changed, router):
        weights_TK = router.weigh(changed.scores_TE, clean.ids_TK, used_TK)
    else:
        weights_TK = DenseRouting(changed).weights_TE.gather(-1, clean.ids_TK) * used_TK
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
    All three parts make R', none makes R. Where R' gives none of R's experts any weight, it says
    nothing about shares among them, and those of R stay.
    """
    if "set" in parts:
        ids_TK, own_TK = changed.ids_TK, changed.weights_TK
        if "weights" not in parts:
            own_TK = _dealt(clean.weights_TK, own_TK)
    else:
        ids_TK, own_TK = clean.ids_TK, clean.weights_TK
        if "weights" in parts:
            moved_TK = _weights(clean, changed, router).weights_TK
            own_TK = torch.where(moved_TK.any(-1, keepdim=True), moved_TK, own_TK)
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
    **{name: partial(_part, parts) for name, parts in COALITIONS.items()},
}
