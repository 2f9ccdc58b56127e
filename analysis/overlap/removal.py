"""Experts dropped one at a time: what it costs, and who takes over.

Shapes: T tokens, E experts, K slots, D documents, H = 2 halves of the documents, N experts of all
sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.adapters import (
    Adapter,
    DenseRouting,
    Router,
    batches,
    check_documents,
    clean_routing,
    route,
    routed_adapter,
)
from analysis.measure import measure
from analysis.perturb import Condition, DropExperts, sites_of
from analysis.stats import SITE, Bootstrap
from cartmoe.config import check_whole
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing, expert_counts

HALVES = ("a", "b")


def expert_damage(
    model: object,
    docs: Sequences,
    *,
    sites: Any = None,
    batch_size: int = 16,
    refill: bool = True,
    bootstrap: Bootstrap = Bootstrap(),
    progress: bool = True,
) -> pd.DataFrame:
    """What it costs to drop each expert of each site alone, for every token.

    sites    as in `measure_overlap`
    refill   whether the router chooses among the others in its place (its logit is -inf, which
             also raises the others' shares where weights are not normalized over the chosen), or
             the slot is lost and the others keep their weights

    A row an expert: model, family, train_seed, layer, stage, expert,
    load            share of the used slots
    mass            weight per token
    damage          rise of the nll in nats per token of the text, with damage_low, damage_high: BCa
                    over documents
    per_mass        the same rise in nats per unit of weight that was dropped; NaN without any
    damage_a, damage_b, per_mass_a, per_mass_b   in each half of the documents, in which they take
                    turns in order of the SHA-256 of their ids; NaN where a half has none
    num_documents, num_tokens

    Raises `ValueError` for a dense model, sites that it does not have, and no documents.
    """
    model, chosen = checked(model, docs, sites, batch_size)
    clean = clean_sums(model, docs, chosen, batch_size)
    return damage_table(model, docs, clean, batch_size, refill, bootstrap, progress)


def takeover(
    model: object, docs: Sequences, *, sites: Any = None, batch_size: int = 16
) -> pd.DataFrame:
    """Who takes over when an expert is dropped: of the weight that others then gain on the tokens
    that used expert_i, the share of expert_j. On clean input, as the site's router decides.

    Where weights are normalized, experts that are used already take over too. A row an ordered
    pair: model, family, train_seed, layer, stage, expert_i, expert_j, takeover, which sums to 1
    over expert_j, and is NaN if expert_i is not used or nobody gains. Raises as `expert_damage`.
    """
    model, chosen = checked(model, docs, sites, batch_size)
    return takeover_table(model, clean_sums(model, docs, chosen, batch_size))


def checked(
    model: object, docs: Sequences, sites: Any, batch_size: int
) -> tuple[Adapter, list[RouterSite]]:
    """The model as a model under study, and its sites that were asked for."""
    model = routed_adapter(model)
    check_whole("batch_size", batch_size, 1)
    check_documents(docs, model)
    return model, sites_of(model, sites)


@dataclass
class CleanSums:
    """Sums over the tokens of one site's clean decisions, fp64 on the CPU.

    slots_E    used slots
    mass_HE    weight, by half of the documents
    gained_EE  weight that expert j gains on the tokens that used expert i when i is dropped
    """

    slots_E: Tensor
    mass_HE: Tensor
    gained_EE: Tensor

    @property
    def takeover_EE(self) -> np.ndarray:
        """Rows sum to 1; NaN where nobody gained."""
        gained_EE = self.gained_EE.numpy()
        total_E1 = gained_EE.sum(1, keepdims=True)
        return gained_EE / np.where(total_E1 > 0, total_E1, np.nan)


def clean_sums(
    model: Adapter, docs: Sequences, sites: list[RouterSite], batch_size: int
) -> dict[RouterSite, CleanSums]:
    """Of each site, over the tokens that have a target."""
    half_of = halves(docs.document_id)
    sums = {}
    for site in sites:
        shapes = (site.num_experts,), (2, site.num_experts), (site.num_experts, site.num_experts)
        sums[site] = CleanSums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    for batch in batches(model, docs, batch_size):
        counts_SL = batch.targets_SL != IGNORE
        half_S = torch.tensor([half_of[d] for d in batch.document_id])
        half_T = half_S[:, None].expand(counts_SL.shape)[counts_SL.cpu()]
        for site, routing in clean_routing(model, batch.tokens_SL).items():
            if site in sums:
                routing = Routing(*(t[counts_SL.flatten()] for t in routing))
                weights_TE = DenseRouting(routing).weights_TE.double().cpu()
                sums[site].slots_E += expert_counts(routing).cpu()
                sums[site].mass_HE.index_add_(0, half_T, weights_TE)
                sums[site].gained_EE += gains(routing, model.router(site))
    return sums


def halves(document_id: Iterable[str]) -> dict[str, int]:
    """0 or 1 for each document: they take turns in order of the SHA-256 of their ids."""
    ordered = sorted(set(document_id), key=lambda id: hashlib.sha256(id.encode()).digest())
    return {id: number % 2 for number, id in enumerate(ordered)}


def gains(routing: Routing, router: Router) -> Tensor:
    """(E, E) fp64: the weight that expert j gains, over the tokens that use expert i, when the
    logit of i becomes -inf."""
    weights_TE = DenseRouting(routing).weights_TE
    gained_EE = torch.zeros((weights_TE.shape[-1],) * 2, dtype=torch.float64)
    for dropped in range(len(gained_EE)):
        uses_T = weights_TE[:, dropped] != 0
        logits_TE = routing.logits_TE[uses_T].clone()
        logits_TE[:, dropped] = -torch.inf
        after_TE = DenseRouting(route(router, logits_TE)).weights_TE
        gained_EE[dropped] = (after_TE - weights_TE[uses_T]).clamp(min=0).double().sum(0).cpu()
    return gained_EE


def damage_table(
    model: Adapter,
    docs: Sequences,
    clean: Mapping[RouterSite, CleanSums],
    batch_size: int,
    refill: bool,
    bootstrap: Bootstrap,
    progress: bool,
) -> pd.DataFrame:
    """The table of `expert_damage`."""
    # Masked scores leave the others' weights as they are, also where a sum of them decides.
    how = {} if refill else {"point": "scores", "effect": "no_refill"}
    places = [(site, expert) for site in clean for expert in range(site.num_experts)]
    conditions = [Condition(DropExperts(ids=(e,)), site, **how) for site, e in places]
    total = len(conditions) * -(-len(docs) // batch_size)
    with tqdm(total=total, unit="batch", disable=not progress) as bar:
        cells = measure(model, conditions, docs, batch_size=batch_size, progress=bar.update)
    losses = cells[0].losses
    documents_D, document = np.unique(losses.document_id, return_inverse=True)
    by_document = [
        np.bincount(document, weights=column)
        for column in (losses.num_tokens, *(c.losses.nll_sum - losses.nll_sum for c in cells[1:]))
    ]
    tokens_D, nats_ND = by_document[0], np.array(by_document[1:])
    half_of = halves(documents_D)
    in_half_DH = np.array([half_of[d] for d in documents_D])[:, None] == np.arange(2)
    mass_NH = np.concatenate([sums.mass_HE.numpy().T for sums in clean.values()])
    load_N = np.concatenate([(s.slots_E / s.slots_E.sum()).numpy() for s in clean.values()])
    found = bootstrap.intervals(nats_ND, np.broadcast_to(tokens_D, nats_ND.shape))
    nats_NH, tokens_H = nats_ND @ in_half_DH, tokens_D @ in_half_DH
    columns = {
        **_keys(model, [site for site, _ in places]),
        "expert": [expert for _, expert in places],
        "load": load_N,
        "mass": mass_NH.sum(1) / tokens_D.sum(),
        **dict(zip(("damage", "damage_low", "damage_high"), found, strict=True)),
        "per_mass": _ratio(nats_ND.sum(1), mass_NH.sum(1)),
    }
    for half, name in enumerate(HALVES):
        columns[f"damage_{name}"] = _ratio(nats_NH[:, half], tokens_H[half])
        columns[f"per_mass_{name}"] = _ratio(nats_NH[:, half], mass_NH[:, half])
    columns |= {"num_documents": len(documents_D), "num_tokens": int(tokens_D.sum())}
    return pd.DataFrame(columns)


def _ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return numerator_N / np.where(denominator_N > 0, denominator_N, np.nan)


def _keys(model: Adapter, sites: Sequence[RouterSite]) -> dict[str, object]:
    """Columns that name sites in every table."""
    layers, stages = [site.layer for site in sites], [site.stage for site in sites]
    return dict(
        zip(SITE, (model.name, model.family, model.train_seed, layers, stages), strict=True)
    )


def takeover_table(model: Adapter, clean: Mapping[RouterSite, CleanSums]) -> pd.DataFrame:
    """The table of `takeover`."""
    frames = []
    for site, sums in clean.items():
        share_EE = sums.takeover_EE
        i, j = np.nonzero(~np.eye(len(share_EE), dtype=bool))
        names = _keys(model, [site] * len(i))
        columns = {"expert_i": i, "expert_j": j, "takeover": share_EE[i, j]}
        frames.append(pd.DataFrame(names | columns))
    return pd.concat(frames, ignore_index=True)
