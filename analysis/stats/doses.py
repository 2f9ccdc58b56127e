"""How much a condition disturbed the routing: sums over tokens and sites -> means."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, Intervals
from analysis.stats.pairs import (
    CONDITION,
    KEY,
    Losses,
    Pairs,
    check_columns,
    of_checkpoint,
    pair_conditions,
    parameter,
)
from analysis.stats.robustness import router_columns

# Of one token at one perturbed site, as defined in analysis/doses.py; output_change is the norm
# of the change of the layer's output as a share of the residual stream's.
DOSES = ["mass_moved", "flips", "flips_total", "changed", "mass_lost", "active", "output_change"]


def doses(routing: pd.DataFrame) -> pd.DataFrame:
    """Per checkpoint and condition the columns `DOSES`: means over tokens and perturbed sites."""
    check_columns("routing", routing, [*KEY, "num_tokens", *DOSES])
    rows = routing[routing.perturbation != "clean"]
    sums = rows.groupby(KEY, dropna=False, sort=False)[["num_tokens", *DOSES]].sum()
    return sums[DOSES].div(sums.num_tokens, axis=0).reset_index()


def dose_by_document(p: Pairs, routing: pd.DataFrame, dose: str) -> np.ndarray:
    """(C, D): a dose of the conditions and documents of p, summed over tokens, averaged over sites
    and eval_seeds; NaN where it was not recorded."""
    check_columns("routing", routing, [*KEY, "eval_seed", "document_id", "num_tokens", dose])
    mine = of_checkpoint(routing, p.checkpoint)
    mine = mine[mine.perturbation != "clean"]
    # A token of a document counts once for each site and eval_seed.
    sums = mine.groupby([*CONDITION, "document_id"], dropna=False)[[dose, "num_tokens"]].sum()
    means = (sums[dose] / sums.num_tokens).unstack("document_id").reindex(columns=p.documents_D)
    rows = pd.MultiIndex.from_frame(p.conditions[CONDITION])
    return means.reindex(rows).to_numpy() * p.tokens_D


PER = {"per_flip": "flips", "per_mass": "mass_moved"}  # column -> the dose under the line


LEAST = 1e-6  # per token: a smaller dose is the rounding of weights


def per_dose(
    losses: Losses,
    routing: pd.DataFrame,
    sites: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage per flip and per mass moved: the slopes of the damage curves from 0.

    One row per checkpoint and condition: the columns that name it, label, delta_nats, and

    per_flip, per_flip_low, per_flip_high    nats per token over flips, the mean share of the
        chosen experts that are no longer used
    per_mass, per_mass_low, per_mass_high    nats per token over the mean routed mass moved

    both as ratios of sums over documents, BCa; NaN without such a dose, and bounds of NaN where
    so few documents have it that a resample may miss it. With `sites` (see `Results.sites`), since
    a flip means something else in every family, also top_k, renormalize, routed_share,
    routed_ratio, and of DropTop experts_off, m / E.
    """
    tables = []
    for p in pair_conditions(losses):
        table = p.table(delta_nats=p.delta_CD.sum(axis=1) / p.tokens_D.sum())
        for name, dose in PER.items():
            dose_CD = dose_by_document(p, routing, dose)
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.array(bootstrap.intervals(p.delta_CD, dose_CD))
            missing = ~(dose_CD.sum(axis=1) > LEAST * p.tokens_D.sum())
            found[1:, ~np.isfinite(found[1:]).all(axis=0)] = np.nan
            shown = Intervals(*np.where(missing, np.nan, found))
            table = table.assign(**shown.columns(name))
        if sites is not None:
            table = table.assign(**router_columns(sites, p.checkpoint))
            table["experts_off"] = _experts_off(table, of_checkpoint(sites, p.checkpoint))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _experts_off(table: pd.DataFrame, sites: pd.DataFrame) -> pd.Series:
    """m / E of DropTop in one checkpoint; where m is a share already, it itself."""
    experts = sites[sites.metric == "num_experts"].value.astype(float).mean()
    is_share = parameter(table, "ratio").notna()
    of_all = table.strength.where(is_share, table.strength / experts)
    return of_all.where(table["name"] == "DropTop")
