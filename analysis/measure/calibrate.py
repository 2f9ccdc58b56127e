"""Statistics of clean routing, which perturbations draw from."""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.adapters import (
    Adapter,
    as_adapter,
    batches,
    check_documents,
    clean_routing,
    owning,
)
from analysis.perturb import Calibration, SiteStats, Tokens, mix64
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing, expert_counts

CALIBRATION = 32  # sequences that a model is calibrated on unless others are given


@owning
@torch.no_grad()
def calibrate(
    model: Adapter, sequences, *, rows: int = 2048, batch_size: int = 16, seed: int = 0
) -> Calibration:
    """Statistics of clean routing over these sequences (a `cartmoe.data.Sequences`).

    rows   logits kept of each site: those of the tokens with the lowest hash, so the reservoir
           does not depend on the batch size. Padding takes no part.
    """
    model = as_adapter(model)
    kept: dict[RouterSite, list[Tensor]] = {site: [] for site in model.sites()}
    counts: dict[RouterSite, Tensor] = {}
    priorities = []
    for batch in batches(model, sequences, batch_size):
        used_T = (batch.targets_SL >= 0).flatten()
        tokens = Tokens.of(batch.tokens_SL, batch.sequence_id_S)
        key_T = mix64(mix64(tokens.sequence_T + seed) + tokens.position_T)[used_T]
        priorities.append(key_T)
        for site, routing in clean_routing(model, batch.tokens_SL).items():
            routing = Routing(*(t[used_T] for t in routing))
            kept[site].append(routing.logits_TE)
            counts[site] = counts.get(site, 0) + expert_counts(routing)
    if not priorities:
        raise ValueError("calibration needs at least one sequence")
    order = torch.cat(priorities).argsort()[:rows]
    stats = {}
    for site, parts in kept.items():
        reservoir = torch.cat(parts)[order]
        load_E = counts[site] / counts[site].sum()
        stats[site] = SiteStats(reservoir, reservoir.double().std().item(), load_E)
    return Calibration(stats)


def calibration_documents(given: Sequences | None, docs: Sequences, *models: Adapter) -> Sequences:
    """Those given, by default the first of the documents. Raises as `check_documents`."""
    if given is None:
        return docs[:CALIBRATION]
    check_documents(given, *models, name="calibration")
    return given
