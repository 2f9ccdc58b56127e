"""Which part of a changed decision is let through.

Shapes: T tokens, E experts, K slots. R is the router's own decision, R' the one under the
perturbation; both list experts best first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from analysis.doses import DenseRouting
from cartmoe.routing import EPS, Router, Routing


def _full(clean: Routing, changed: Routing, router: Router) -> Routing:
    """R' as it is."""
    return changed


def _selection(clean: Routing, changed: Routing, router: Router) -> Routing:
    """The ids of R', by rank with the sorted clean weights, as many as both have."""
    by_rank_TK = clean.weights_TK.sort(-1, descending=True).values
    weights_TK = torch.where(changed.weights_TK != 0, _fit(by_rank_TK, changed.weights_TK), 0)
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


def _fit(a_TK: Tensor, b_TK: Tensor) -> Tensor:
    """a with as many columns as b, cut or padded with 0."""
    missing = b_TK.shape[-1] - a_TK.shape[-1]
    return torch.nn.functional.pad(a_TK, (0, missing)) if missing else a_TK


EFFECTS: dict[str, Callable[[Routing, Routing, Router], Routing]] = {
    "full": _full,
    "selection": _selection,
    "weights": _weights,
    "no_refill": _no_refill,
}
