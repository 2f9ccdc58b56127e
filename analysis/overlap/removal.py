"""Experts dropped one at a time: what it costs, and who takes over.

Shapes: T tokens, E experts, C conditions, S sequences, D documents, H = 2 halves of the documents,
N experts of all sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from analysis.adapters import Adapter, DenseRouting, Router, batches, num_batches, owning
from analysis.measure import measure
from analysis.overlap.metrics import Sums, UnitSums, usage
from analysis.overlap.request import check_run
from analysis.overlap.routed import by_document, decisions, of_tokens
from analysis.overlap.tables import site_columns
from analysis.perturb import Condition, DropExperts, Where
from analysis.stats import Bootstrap
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

HALVES = ("a", "b")


@owning
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
    return Removal(model, docs, sites, batch_size).damage(refill, bootstrap, progress)


@owning
def takeover(
    model: object, docs: Sequences, *, sites: Any = None, batch_size: int = 16
) -> pd.DataFrame:
    """Who takes over when an expert is dropped: of the weight that others then gain on the tokens
    that used expert_i, the share of expert_j. On clean input, as the site's router decides.

    Where weights are normalized, experts that are used already take over too. A row an ordered
    pair: model, family, train_seed, layer, stage, expert_i, expert_j, takeover, which sums to 1
    over expert_j, and is NaN if expert_i is not used or nobody gains. Raises as `expert_damage`.
    """
    return Removal(model, docs, sites, batch_size).takeover()


class Removal:
    """Experts of a model that are dropped one at a time; raises as `expert_damage`."""

    def __init__(self, model: object, docs: Sequences, sites: Any, batch_size: int):
        self.model, self.sites = check_run(model, docs, sites, batch_size)
        self.docs, self.batch_size = docs, batch_size

    @cached_property
    def clean(self) -> dict[RouterSite, Sums]:
        """Of each site's clean decisions, over the tokens that have a target: used and mass (2, E),
        how often experts are used and at which weight, by half of the documents; gained (1, E, E),
        the weight that expert j gains on the tokens that used expert i when i is dropped."""
        half_of = halves(self.docs.document_id)
        sums = {site: (UnitSums(len(HALVES)), UnitSums(1)) for site in self.sites}
        for batch in batches(self.model, self.docs, self.batch_size):
            half_T = of_tokens(batch, half_of)
            for site, routing in decisions(self.model, batch, self.sites).items():
                dense, (by_half, together) = DenseRouting(routing), sums[site]
                by_half.add_tokens(half_T, used=dense.used_TE, mass=dense.weights_TE)
                together.add(0, gained=gains(routing, self.model.router(site)))
        return {site: by_half | together for site, (by_half, together) in sums.items()}

    @cached_property
    def shares(self) -> dict[RouterSite, np.ndarray]:
        """(E, E) of what is gained when expert i is dropped, the share of expert j: rows sum to 1;
        NaN where nobody gained."""
        return {site: shares_of(sums["gained"][0].numpy()) for site, sums in self.clean.items()}

    def damage(self, refill: bool, bootstrap: Bootstrap, progress: bool) -> pd.DataFrame:
        """The table of `expert_damage`."""
        # Masked scores leave the others' weights as they are, also where a sum of them decides.
        how: Any = {} if refill else {"point": "scores", "effect": "no_refill"}
        places = [(site, expert) for site in self.sites for expert in range(site.num_experts)]
        conditions = [
            Condition(DropExperts(ids=(e,)), Where(*site.place), **how) for site, e in places
        ]
        nats_ND = rises(self.model, self.docs, conditions, self.batch_size, progress)
        (tokens_D,) = by_document(self.docs, [(self.docs.targets_SL != IGNORE).sum(1).numpy()])
        half_of = halves(self.docs.document_id)
        in_half_DH = np.array([[half_of[d]] for d in np.unique(self.docs.document_id)]) == [0, 1]
        nats_NH, tokens_H = nats_ND @ in_half_DH, tokens_D @ in_half_DH
        clean = self.clean.values()
        mass_NH = np.concatenate([sums["mass"].numpy().T for sums in clean])
        rise = bootstrap.intervals(nats_ND, np.broadcast_to(tokens_D, nats_ND.shape))
        columns = {
            "load": np.concatenate([usage.share(sums["used"].sum(0)).numpy() for sums in clean]),
            "mass": mass_NH.sum(1) / tokens_D.sum(),
            **rise.columns("damage"),
            "per_mass": _ratio(nats_ND.sum(1), mass_NH.sum(1)),
        }
        for half, name in enumerate(HALVES):
            columns[f"damage_{name}"] = _ratio(nats_NH[:, half], tokens_H[half])
            columns[f"per_mass_{name}"] = _ratio(nats_NH[:, half], mass_NH[:, half])
        columns |= {"num_documents": len(tokens_D), "num_tokens": int(tokens_D.sum())}
        rows = [site_columns(self.model, site) | {"expert": expert} for site, expert in places]
        return pd.DataFrame(rows).assign(**columns)

    def takeover(self) -> pd.DataFrame:
        """The table of `takeover`."""
        frames = []
        for site, share_EE in self.shares.items():
            i, j = np.nonzero(~np.eye(len(share_EE), dtype=bool))
            pairs = {"expert_i": i, "expert_j": j, "takeover": share_EE[i, j]}
            frames.append(pd.DataFrame(site_columns(self.model, site) | pairs))
        return pd.concat(frames, ignore_index=True)


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
        after_TE = DenseRouting(router.route(logits_TE)).weights_TE
        gained_EE[dropped] = (after_TE - weights_TE[uses_T]).clamp(min=0).double().sum(0).cpu()
    return gained_EE


def shares_of(gained_EE: np.ndarray) -> np.ndarray:
    """Rows over their sums; NaN where that is 0."""
    return _ratio(gained_EE, gained_EE.sum(1, keepdims=True))


def rises(
    model: Adapter, docs: Sequences, conditions: list[Condition], batch_size: int, progress: bool
) -> np.ndarray:
    """(C, D) rise of each document's summed nll under each condition, nats; see `by_document`."""
    total = len(conditions) * num_batches(docs, batch_size)
    with tqdm(total=total, unit="forward", disable=not progress) as bar:
        clean, *cells = measure(model, conditions, docs, batch_size=batch_size, progress=bar.update)
    return by_document(docs, [cell.losses.nll_sum - clean.losses.nll_sum for cell in cells])


def _ratio(numerator_N: np.ndarray, denominator_N: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return numerator_N / np.where(denominator_N > 0, denominator_N, np.nan)
