"""Damage of single experts against what they have in common with those that take over.

Shapes: N experts of C clusters, a cluster being one site of one checkpoint; R resamples; X rows of
moments: the sample, or resamples of it; M = 2 + P columns: damage, overlap and P of the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import CHECKPOINT, SITE, check_choice, check_columns
from analysis.stats.contrasts import holm

DAMAGES = ("per_mass", "damage")
PARTS = tuple(f"{damage}_" for damage in DAMAGES)  # of halves of the documents, ends of intervals
LOAD, ALL = "load", "all"
ROUNDING = 1e-9  # a share of the variance below which there is none
LEAST = 2  # clusters that say something about their spread
FREE = 2  # dimensions to be left beside the control: in one, every correlation is 1 or -1
UNDEFINED = 0.25  # the most of the resamples that may say nothing


def relation(
    experts: pd.DataFrame,
    metrics: str | Sequence[str],
    damage: str = "per_mass",
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """How the damage done by dropping an expert goes with its overlap, given load, within sites.

    experts  a row an expert: model, family, train_seed, layer, stage, load, mass, damage (nats per
             token), per_mass (nats per dropped weight), each of these two with _a and _b from
             two halves of the documents, and a column a metric (see `analysis.relate`)
    metrics  names of such columns; more of it must mean more in common
    damage   "per_mass" or "damage"

    A row a model ("all", then each) and metric, the last one being the load alone:

    metric, damage, model, family
    r            partial Spearman correlation: ranks within each site, centered and as shares of its
                 experts, pooled over sites, less what goes with a cubic polynomial of the ranks of
                 load and with log load (where load drives both, its rank alone leaves an r of up to
                 0.1; this leaves a third of that). Of the load itself: without that
    low, high    tanh(atanh r +- t s): s is the spread of atanh r in a bootstrap that draws C - 1 of
                 C clusters (Rao and Wu, JASA 83, 1988), t the quantile of Student's distribution
                 with C - 1 degrees of freedom. NaN with fewer than two clusters, and where more
                 than a quarter of the resamples leave r undefined
    null_low, null_high   where r lies if overlap is as good as drawn by lot: quantiles over
                 permutations within sites of the damage that is left when load is taken away
                 (Freedman and Lane, Journal of Business and Economic Statistics 1, 1983)
    p, p_holm    of |r| among them, and adjusted by Holm's method over the metrics of a model
    reliability, ceiling  the correlation of the damage in two halves of the documents, treated
                 like r, stepped up to all documents by Spearman and Brown (2 r / (1 + r)), and its
                 root: the r of a perfect predictor
    num_sites (clusters), num_experts, num_models (checkpoints), min_seeds (the fewest training
    seeds of a model)

    Experts without weight are left out, and for a metric those for which it is NaN, and then sites
    in which it or the damage is one number. What says the same as load (or nothing) has an r of
    NaN, and so have experts too few to tell (C clusters need C + 6, for the load itself C + 2);
    resamples and permutations with such an r do not count. Clusters of one checkpoint share its
    training, so an interval from few checkpoints speaks for them: read num_models and min_seeds
    beside it. Damage and metrics are measured on the same documents, so they share sampling noise:
    it adds to r, and the ceiling, which is made of damage alone, does not know of it. Raises
    `ValueError` for missing columns, an unknown damage, a metric that is damage itself, and a model
    called "all".
    """
    check_choice("damage", damage, DAMAGES)
    metrics = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    halves = [f"{damage}_a", f"{damage}_b"]
    check_columns("experts", experts, [*SITE, LOAD, "mass", damage, *halves, *metrics])
    itself = [name for name in metrics if name in DAMAGES or name.startswith(PARTS)]
    if itself:
        raise ValueError(f"metrics has {', '.join(itself)}, which is damage: it predicts itself")
    if (experts.model == ALL).any():
        raise ValueError(
            f"experts has a model called {ALL!r}, as all together are; name it otherwise"
        )
    used = experts[(experts.mass > 0) & experts[damage].notna()]
    rows = []
    families = {ALL: ALL} | dict(zip(experts.model, experts.family, strict=True))
    for model, family in families.items():
        own = used if model == ALL else used[used.model == model]
        for metric in (*(name for name in metrics if name != LOAD), LOAD):
            named = {"metric": metric, "damage": damage, "model": model, "family": family}
            known = own[own[metric].notna()]
            rows.append(named | _relate(known, metric, damage, halves, bootstrap))
    table = pd.DataFrame(rows)
    by_model = table[table.p.notna()].groupby("model")
    table["p_holm"] = by_model.p.transform(lambda p: holm(p.to_numpy()))
    return table


def _relate(
    rows: pd.DataFrame, metric: str, damage: str, halves: list[str], bootstrap: Bootstrap
) -> dict[str, float]:
    control = None if metric == LOAD else LOAD
    rows = _varied(rows, [damage, metric])
    ranks_NM, cluster_N = _ranks(rows, [damage, metric], control)
    moments_CMM, free_C = _moments(ranks_NM, cluster_N)
    r = _partial(moments_CMM.sum(0), free_C.sum())
    low, high = _interval(moments_CMM, free_C, r, bootstrap)
    null_R = np.empty(0) if np.isnan(r) else _null(ranks_NM, cluster_N, bootstrap)
    null_low, null_high = np.quantile(null_R, bootstrap.tails) if len(null_R) else (np.nan, np.nan)
    # Equal but for rounding is as extreme; the observed order is one of the permutations.
    as_extreme = 1 + (np.abs(null_R) >= abs(r) - ROUNDING).sum()
    p = as_extreme / (1 + len(null_R)) if len(null_R) else np.nan
    split = _varied(rows.dropna(subset=halves), halves)
    moments_of_halves_CMM, free_C = _moments(*_ranks(split, halves, control))
    half = _partial(moments_of_halves_CMM.sum(0), free_C.sum())
    reliability = 2 * half / (1 + half) if half > -1 else np.nan
    seeds = rows.groupby(CHECKPOINT[:2]).train_seed.nunique()
    return {
        **{"r": r, "low": low, "high": high, "null_low": null_low, "null_high": null_high},
        **{"p": p, "p_holm": np.nan},
        **{"reliability": reliability, "ceiling": np.sqrt(max(reliability, 0.0))},
        **{"num_sites": len(moments_CMM), "num_experts": len(rows)},
        **{"num_models": int(seeds.sum()), "min_seeds": int(seeds.min()) if len(rows) else 0},
    }


def _varied(rows: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Those of sites in which each of the columns has several values."""
    return rows[(rows.groupby(SITE)[columns].transform("nunique") > 1).all(axis=1)]


def _ranks(
    rows: pd.DataFrame, columns: list[str], control: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Within each cluster centered ranks of two columns, as shares of its experts, three powers of
    those of the control, and its logarithm (N, M); the number of the cluster (N,)."""
    by_site = rows.groupby(SITE, sort=False)
    size_N = by_site[columns[0]].transform("size")

    def ranks(name: str) -> pd.Series:
        return (by_site[name].rank() - (size_N + 1) / 2) / size_N

    known = [ranks(name) for name in columns]
    if control:
        known += [*(ranks(control) ** power for power in (1, 2, 3)), np.log(rows[control])]
    cluster_N = by_site.ngroup()
    table = pd.concat(known, axis=1)
    return (table - table.groupby(cluster_N).transform("mean")).to_numpy(), cluster_N.to_numpy()


def _moments(ranks_NM: np.ndarray, cluster_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C, M, M) sums of products within each cluster, and (C,) its dimensions."""
    clusters, columns = cluster_N.max(initial=-1) + 1, ranks_NM.shape[1]
    moments_CMM = np.zeros((clusters, columns, columns))
    np.add.at(moments_CMM, cluster_N, ranks_NM[:, :, None] * ranks_NM[:, None, :])
    return moments_CMM, np.bincount(cluster_N, minlength=clusters) - 1


def _partial(moments_XMM: np.ndarray, free_X: np.ndarray) -> Any:
    """(X,) correlation of the first two given the others; NaN where these leave no variance, or of
    the dimensions too few."""
    both_X22, cross_X2P = moments_XMM[..., :2, :2], moments_XMM[..., :2, 2:]
    slope_X2P = cross_X2P @ np.linalg.pinv(moments_XMM[..., 2:, 2:], hermitian=True)
    left_X22 = both_X22 - slope_X2P @ cross_X2P.swapaxes(-1, -2)
    own_X2 = np.diagonal(left_X22, axis1=-2, axis2=-1)
    whole_X2 = np.diagonal(both_X22, axis1=-2, axis2=-1)
    few_X = free_X - cross_X2P.shape[-1] < FREE
    defined_X = (own_X2 > ROUNDING * whole_X2).all(-1) & ~few_X
    scale_X = np.sqrt(np.where(defined_X[..., None], own_X2, 1.0).prod(-1))
    return np.where(defined_X, (left_X22[..., 0, 1] / scale_X).clip(-1, 1), np.nan)[()]


def _interval(
    moments_CMM: np.ndarray, free_C: np.ndarray, r: float, bootstrap: Bootstrap
) -> tuple[float, float]:
    clusters = len(moments_CMM)
    if clusters < LEAST or np.isnan(r):
        return np.nan, np.nan
    rng = np.random.default_rng([bootstrap.seed, 1])
    even_C = np.full(clusters, 1 / clusters)
    counts_RC = rng.multinomial(clusters - 1, even_C, size=bootstrap.resamples)
    # A cluster that is drawn twice says no more.
    r_R = _partial(np.tensordot(counts_RC, moments_CMM, 1), (counts_RC > 0) @ free_C)
    undefined_R = np.isnan(r_R)
    if undefined_R.mean() > UNDEFINED:
        return np.nan, np.nan
    spread = np.std(_fisher(r_R[~undefined_R]))
    half = spread * stdtrit(clusters - 1, bootstrap.tails[1])
    return float(np.tanh(_fisher(r) - half)), float(np.tanh(_fisher(r) + half))


def _fisher(r: Any) -> Any:
    """atanh, of perfect correlations that of one as good as perfect."""
    return np.arctanh(np.clip(r, -1 + ROUNDING, 1 - ROUNDING))


def _null(ranks_NM: np.ndarray, cluster_N: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """(R,) r when, within clusters, what the control leaves of the damage is permuted; fewer where
    it then takes all."""
    both_N2, control_NP = ranks_NM[:, :2], ranks_NM[:, 2:]
    inverse_PP = np.linalg.pinv(control_NP.T @ control_NP, hermitian=True)
    left_N2 = both_N2 - control_NP @ (inverse_PP @ (control_NP.T @ both_N2))
    damage_N, overlap_N = left_N2.T
    others_NP1 = np.column_stack([overlap_N, control_NP])
    rng = np.random.default_rng([bootstrap.seed, 2])
    dots_RP1 = np.zeros((bootstrap.resamples, others_NP1.shape[1]))
    for cluster in range(cluster_N.max() + 1):
        own = np.flatnonzero(cluster_N == cluster)
        orders_RN = np.tile(damage_N[own], (bootstrap.resamples, 1))
        dots_RP1 += rng.permuted(orders_RN, axis=1) @ others_NP1[own]
    taken_R = np.einsum("rp,pq,rq->r", dots_RP1[:, 1:], inverse_PP, dots_RP1[:, 1:])
    left_R = damage_N @ damage_N - taken_R
    defined_R = left_R > ROUNDING * (damage_N @ damage_N)
    scale_R = np.sqrt(left_R[defined_R] * (overlap_N @ overlap_N))
    return (dots_RP1[defined_R, 0] / scale_R).clip(-1, 1)
