"""Expert outputs of a site from a table, where many conditions perturb the same clean stream.

At the first site that a condition perturbs, what enters the experts is the clean stream, the same
for every condition that begins there. The outputs of all E experts on it cost E / K forwards of the
routed experts, and then each condition only a weighted sum of rows. Shapes: T tokens, D model, E
experts, K slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters import Adapter, Experts
from analysis.perturb import Condition
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

MAX_BYTES = 2**28  # of one table: 256 MiB
PAYS = 2  # a table is made where there are so many times the conditions that pay for it
FEW = 2  # experts that a token is taken to use where a top-p rule decides it


class Table:
    """The experts of one site on one batch's clean stream, in the place of the experts themselves;
    made when first asked.

    clean   the clean decision, which the experts themselves compute: what changed nothing then
            equals the clean run to the last bit
    """

    def __init__(self, model: Adapter, site: RouterSite, clean: Routing):
        self.model, self.site, self.clean = model, site, clean
        self.rows_ND: Tensor | None = None  # N = E * T, expert by expert

    def __call__(self, x_TD: Tensor, routing: Routing, own: Experts) -> Tensor:
        """(T, D) weighted sum of the chosen experts' outputs."""
        if all(map(torch.equal, routing[2:], self.clean[2:])):
            return own(x_TD, routing)
        if self.rows_ND is None:
            self.rows_ND = self.model.expert_outputs(self.site, x_TD).flatten(0, 1)
        T = len(x_TD)
        row_TK = routing.ids_TK * T + torch.arange(T, device=x_TD.device)[:, None]
        weights_TK = routing.weights_TK.to(self.rows_ND.dtype)
        return F.embedding_bag(row_TK, self.rows_ND, per_sample_weights=weights_TK, mode="sum")


def worth_reusing(
    model: Adapter, conditions: Sequence[Condition], num_tokens: int
) -> Collection[Condition]:
    """The conditions for which a table pays: those that begin at a site with PAYS * E / K others.

    num_tokens   of a batch; a table of more than `MAX_BYTES` is not made
    """
    segments = [segment for segment in model.segments() if segment.sites]
    # What must change nothing (or may, as a plain function) is not rounded in another way either.
    conditions = [c for c in conditions if getattr(c.perturbation, "expects", "none") != "none"]
    firsts = {c: next(s.sites for s in segments if any(map(c.where, s.sites))) for c in conditions}
    number = Counter(firsts.values())
    return frozenset(
        c
        for c, sites in firsts.items()
        if len(sites) == 1
        and number[sites] >= PAYS * sites[0].num_experts / _used(model, sites[0])
        and fits(model, sites[0], num_tokens)
    )


def fits(model: Adapter, site: RouterSite, num_tokens: int) -> bool:
    """Whether a table of so many tokens stays below `MAX_BYTES`."""
    return site.num_experts * num_tokens * model.width * 4 <= MAX_BYTES


def _used(model: Adapter, site: RouterSite) -> float:
    top_k = model.router(site).facts["top_k"]
    return FEW if math.isnan(top_k) else top_k
