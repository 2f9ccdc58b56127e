"""Which expert of one model stands for which of another: numbers mean nothing between models that
were trained apart.

Shapes: T tokens, E experts, F their width, D model, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, batches, clean_routing
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

SAME = 0.5  # mean cosine of experts' weights: of independent ones about 0, of tuned ones near 1
# By (layer, stage), (E,) int64: for each expert that of the reference whose place it takes.
Numbers = Mapping[tuple[int, int], Tensor]


def same_numbers(reference: Adapter, model: Adapter) -> bool:
    """Whether experts of equal number descend from one another: their weights are alike."""
    theirs = {site.place: site for site in model.sites()}
    cosines = []
    for site in reference.sites():
        if (other := theirs.get(site.place)) is None or other.num_experts != site.num_experts:
            continue
        pairs = zip(reference.expert_weights(site), model.expert_weights(other), strict=True)
        for a_EXY, b_EXY in pairs:
            if a_EXY.shape != b_EXY.shape:
                return False
            b_EXY = b_EXY.to(a_EXY)
            cosines.append(F.cosine_similarity(a_EXY.flatten(1), b_EXY.flatten(1)).mean())
    return not cosines or bool(torch.stack(cosines).mean() >= SAME)


def matched_by_usage(
    reference: Adapter, models: Mapping[str, Adapter], docs: Sequences, batch_size: int
) -> dict[str, Numbers]:
    """One to one, so that on as many tokens as can be both of a pair are used."""
    from scipy.optimize import linear_sum_assignment  # a worker does without, and begins sooner

    both: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in models}
    for name, batch, site, base, other in side_by_side(reference, models, docs, batch_size):
        used_T = (batch.targets_SL >= 0).flatten()
        mine_TE, theirs_TE = (DenseRouting(r).used_TE[used_T].double() for r in (base, other))
        both_EE = (theirs_TE.mT @ mine_TE).cpu()
        both[name][site.place] = both[name].get(site.place, 0) + both_EE
    return {
        name: {
            place: torch.from_numpy(linear_sum_assignment(both_EE.numpy(), maximize=True)[1])
            for place, both_EE in sites.items()
        }
        for name, sites in both.items()
    }


def renumbered(routing: Routing, number_E: Tensor) -> Routing:
    """The same decision with these numbers for its experts."""
    number_E = number_E.to(routing.ids_TK.device)
    order_E = number_E.argsort()
    logits_TE, scores_TE = routing.logits_TE[:, order_E], routing.scores_TE[:, order_E]
    return Routing(logits_TE, scores_TE, number_E[routing.ids_TK], routing.weights_TK)


def side_by_side(
    reference: Adapter, others: Mapping[str, Adapter], docs: Sequences, batch_size: int
) -> Iterator[tuple[str, Sequences, RouterSite, Routing, Routing]]:
    """(another's name, batch, its site, the reference's decisions there, its own), where both have
    as many experts."""
    for batch in batches(reference, docs, batch_size):
        decisions = clean_routing(reference, batch.tokens_SL).items()
        own = {site.place: (site.num_experts, routing) for site, routing in decisions}
        for name, model in others.items():
            theirs = clean_routing(model, batch.tokens_SL.to(model.device))
            for site, routing in theirs.items():
                have, base = own.get(site.place, (0, None))
                if base is not None and have == site.num_experts:
                    here = Routing(*(t.to(reference.device) for t in routing))
                    yield name, batch, site, base, here
