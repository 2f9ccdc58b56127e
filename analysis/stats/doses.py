"""How much a condition disturbed the routing (sums over tokens and sites -> means), damage per dose
and damage curves in a few numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, Intervals
from analysis.stats.columns import (
    CHECKPOINT,
    CONDITION,
    KEY,
    PLAIN,
    check_choice,
    check_columns,
    control,
    of_checkpoint,
    parameter,
)
from analysis.stats.pairs import Losses, Pairs, pair_conditions
from analysis.stats.robustness import router_columns

# Of one token at one perturbed site, as defined in analysis/measure/doses.py; output_change is the
# norm of the change of the layer's output as a share of the residual stream's.
DOSES = ["mass_moved", "flips", "flips_total", "changed", "mass_lost", "active", "output_change"]


def doses(routing: pd.DataFrame) -> pd.DataFrame:
    """Per checkpoint and condition the columns `DOSES`: means over tokens and perturbed sites; NaN
    where one is not known at any."""
    check_columns("routing", routing, [*KEY, "num_tokens", *DOSES])
    rows = routing[routing.perturbation != "clean"]
    sums = rows.groupby(KEY, dropna=False, sort=False)[["num_tokens", *DOSES]].sum(min_count=1)
    return sums[DOSES].div(sums.num_tokens, axis=0).reset_index()


def dose_by_document(p: Pairs, routing: pd.DataFrame, dose: str) -> np.ndarray:
    """(C, D): a dose of the conditions and documents of p, summed over tokens, averaged over sites
    and eval_seeds; NaN where it was not recorded."""
    check_columns("routing", routing, [*KEY, "eval_seed", "document_id", "num_tokens", dose])
    mine = of_checkpoint(routing, p.checkpoint)
    mine = mine[mine.perturbation != "clean"]
    # A token of a document counts once for each site and eval_seed.
    by_document = mine.groupby([*CONDITION, "document_id"], dropna=False)
    sums = by_document[[dose, "num_tokens"]].sum(min_count=1)
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

    One row per checkpoint and condition: the columns that name it, label, num_documents,
    delta_nats, and

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
        nats_C = p.delta_CD.sum(axis=1) / p.tokens_D.sum()
        own = bootstrap.within(p.domain_D)
        table = p.table(num_documents=len(p.documents_D), delta_nats=nats_C)
        for name, dose in PER.items():
            dose_CD = dose_by_document(p, routing, dose)
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.array(own.intervals(p.delta_CD, dose_CD))
            missing = ~(dose_CD.sum(axis=1) > LEAST * p.tokens_D.sum())
            found[1:, ~np.isfinite(found[1:]).all(axis=0)] = np.nan
            table = table.assign(**Intervals(*np.where(missing, np.nan, found)).columns(name))
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


CURVE = [column for column in KEY if column != "strength"]
CENSORED = ["ln2_censored", "half_random_censored"]
SUMMARY = ["dose_high", "area", "dose_ln2", CENSORED[0], "dose_half_random", CENSORED[1]]


def curve_summary(
    damage: pd.DataFrame, perturbation: str, x: str = "mass_moved", upto: float | None = None
) -> pd.DataFrame:
    """Each curve of `damage` against dose x for one perturbation, summarized.

    model, family, train_seed, perturbation, where, point, effect, downstream
    dose_high, area               area under delta_nats for doses from 0 (no damage) to
                                  dose_high: `upto`, or the largest dose that every curve
                                  reaches (NaN for a curve that ends before `upto`)
    dose_ln2, ln2_censored        smallest dose that costs ln 2 nats per token
    dose_half_random, half_random_censored   the same for half of the damage of RandomRouting
                                  at the same sites (NaN where that was not run)

    Points are joined by straight lines. A censored dose was not reached: it lies beyond the
    value given, the largest dose tried. A curve of which no point is known, since no token was
    changed, has NaN. Point estimates; for intervals, read the curve's own.
    Raises `ValueError` for missing columns or a perturbation that is not there.
    """
    check_columns("damage", damage, [*CURVE, "name", "strength", "delta_nats", x])
    check_choice("perturbation", perturbation, damage.perturbation.unique())
    rows = damage[damage.perturbation == perturbation]
    curves = [(key, _points(curve, x)) for key, curve in rows.groupby(CURVE, sort=False)]
    reached = [dose[-1] for _, (dose, _) in curves if len(dose)]
    top = min(reached, default=np.nan) if upto is None else upto
    ceiling = {}
    for place, rows in damage.groupby([*CHECKPOINT, "where"]):
        random = control(rows.assign(where=PLAIN["where"]), "RandomRouting")
        ceiling[place] = random.delta_nats.iloc[-1] if len(random) else np.nan
    out = []
    for key, (dose, nats) in curves:
        row = dict(zip(CURVE, key, strict=True))
        if not len(dose):
            out.append(row)
            continue
        inside = dose < top
        grid = np.append(dose[inside], top)
        heights = np.append(nats[inside], np.interp(top, dose, nats))
        row["dose_high"] = top
        row["area"] = np.trapezoid(heights, grid) if dose[-1] >= top else np.nan
        row["dose_ln2"], row["ln2_censored"] = _reaches(dose, nats, np.log(2))
        half = ceiling[(*(row[c] for c in CHECKPOINT), row["where"])] / 2
        row["dose_half_random"], row["half_random_censored"] = _reaches(dose, nats, half)
        out.append(row)
    table = pd.DataFrame(out, columns=[*CURVE, *SUMMARY])
    return table.assign(**{name: table[name].eq(True) for name in CENSORED})


def _points(curve: pd.DataFrame, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Its doses and changes, from no damage at 0; nothing where none is known."""
    curve = curve.dropna(subset=[x, "delta_nats"]).sort_values(x)
    if curve.empty:
        return np.array([]), np.array([])
    return np.append(0.0, curve[x]), np.append(0.0, curve.delta_nats)


def _reaches(dose: np.ndarray, nats: np.ndarray, target: float) -> tuple[float, bool]:
    """The first dose where the curve attains the target, and whether it never does."""
    if np.isnan(target):
        return np.nan, False
    above = np.flatnonzero(nats >= target)
    if not len(above):
        return dose[-1], True
    i = above[0]
    if i == 0:
        return dose[0], False
    step = (target - nats[i - 1]) / (nats[i] - nats[i - 1])
    return dose[i - 1] + step * (dose[i] - dose[i - 1]), False
