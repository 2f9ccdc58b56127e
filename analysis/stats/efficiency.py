"""Damage per unit of what was done to the routing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import intervals
from analysis.stats.doses import dose_by_document
from analysis.stats.pairs import Losses, base_name, pair
from analysis.stats.robustness import router_columns

PER = {"per_flip": "flips", "per_mass": "mass_moved"}  # column -> the dose under the line
LEAST = 1e-6  # per token: a smaller dose is the rounding of weights


def per_dose(
    losses: Losses,
    routing: pd.DataFrame,
    sites: pd.DataFrame | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
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
    options = dict(confidence=confidence, resamples=resamples, seed=seed)
    tables = []
    for p in pair(losses):
        if p.conditions.empty:
            continue
        table = p.conditions.drop(columns="ids").assign(
            delta_nats=p.delta_CD.sum(axis=1) / p.tokens_D.sum()
        )
        for name, dose in PER.items():
            dose_CD = dose_by_document(p, routing, dose)
            columns = [name, f"{name}_low", f"{name}_high"]
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.array(intervals(p.delta_CD, dose_CD, **options))
            missing = ~(dose_CD.sum(axis=1) > LEAST * p.tokens_D.sum())
            found[1:, ~np.isfinite(found[1:]).all(axis=0)] = np.nan
            table[columns] = np.where(missing, np.nan, found).T
        if sites is not None:
            table = table.assign(**router_columns(sites, p.checkpoint))
            table["experts_off"] = _experts_off(table, sites, p.checkpoint)
        for i, (name, value) in enumerate(p.checkpoint.items()):
            table.insert(i, name, value)
        tables.append(table)
    if not tables:
        raise ValueError("losses have clean rows only: there is no condition to compare with them")
    return pd.concat(tables, ignore_index=True)


def _experts_off(table: pd.DataFrame, sites: pd.DataFrame, checkpoint: dict) -> pd.Series:
    """m / E of DropTop; where m is a share already, it itself."""
    mine = sites[
        (sites.model == checkpoint["model"]) & (sites.train_seed == checkpoint["train_seed"])
    ]
    experts = mine[mine.metric == "num_experts"].value.astype(float).mean()
    of_all = table.strength.where(
        table.perturbation.str.contains("ratio"), table.strength / experts
    )
    return of_all.where(base_name(table.perturbation) == "DropTop")
