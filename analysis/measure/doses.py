"""How much a decision was changed, token by token: the doses that damage is plotted against.

Shapes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.adapters import DenseRouting, Router
from cartmoe.routing import Routing


def flip_share(before: DenseRouting, after: DenseRouting) -> Tensor:
    """(T,) |S \\ S'| / |S|: the share of the experts before that are not used after."""
    gone_T = (before.used_TE & ~after.used_TE).sum(-1)
    return gone_T / before.count_T.clamp(min=1)


def change_of(base: DenseRouting, changed: DenseRouting, clean: DenseRouting) -> dict[str, Tensor]:
    """(T,) each: what a condition did to R = base, the router's own decision on its input.

    flips        share of R's experts that are no longer used (the direct effect)
    flips_total  the same against the clean run's decision, which cascades have moved too
    changed      1 where the set of experts is another one
    mass_moved   total variation between the two weight vectors, sum |w - w'| / 2
    mass_lost    weight that R gave to experts that are no longer used
    active       experts used
    """
    return {
        "flips": flip_share(base, changed),
        "flips_total": flip_share(clean, changed),
        "changed": (base.used_TE != changed.used_TE).any(-1),
        "mass_moved": (base.weights_TE - changed.weights_TE).abs_().sum(-1) / 2,
        "mass_lost": (base.weights_TE * ~changed.used_TE).sum(-1),
        "active": changed.count_T,
    }


def certainty_of(routing: Routing, dense: DenseRouting, router: Router) -> dict[str, Tensor]:
    """(T,) each: how decided a clean decision was.

    entropy  of the scores as a distribution, in nats
    margin   how far it is from another one; see `Router.margin`
    """
    scores_TE = routing.scores_TE
    p_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    return {
        "entropy": torch.special.entr(p_TE).sum(-1),
        "margin": router.margin(routing, dense.count_T),
    }
