"""Two models compared over their training runs, not only over the documents of one."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.stats.bootstrap import check_resampling, resampled_ratios
from analysis.stats.damage import by_seed, check_documents
from analysis.stats.pairs import Pairs, pair


def over_seeds(
    losses: pd.DataFrame,
    model_a: str,
    model_b: str,
    condition: str,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean damage of a condition (a label) over model_a's training seeds minus model_b's.

    One row: model_a, model_b, condition, seeds_a, seeds_b, num_documents, delta_nats, low, high
    (nats per token), p, min_p.

    The interval is delta_nats +- t * s: s is the spread of a two-level bootstrap that draws
    documents (the same for all runs) and training seeds, t the quantile of Student's
    distribution with seeds_a + seeds_b - 2 degrees of freedom. Plain quantiles over two or three
    seeds would be far too narrow. With one seed in either model it is NaN. p is the two-sided
    permutation test over seeds and min_p the smallest that their numbers allow: no effect,
    however large, can give less. Raises `ValueError` like `contrast_models`.
    """
    check_resampling(confidence, resamples)
    pairs = pair(losses)
    a = list(by_seed(pairs, "model_a", model_a).values())
    b = list(by_seed(pairs, "model_b", model_b).values())
    check_documents(a + b)
    damage_a, damage_b = (np.array([_damage(p, condition) for p in side]) for side in (a, b))
    delta = damage_a.mean() - damage_b.mean()
    half = np.nan
    if min(len(a), len(b), len(a[0].documents_D) - 1) > 1:
        rng = np.random.default_rng([seed, 1])
        means_a, means_b = (_two_level(side, condition, resamples, seed, rng) for side in (a, b))
        spread = np.std(means_a - means_b, ddof=1)
        half = spread * stdtrit(len(a) + len(b) - 2, (1 + confidence) / 2)
    p, min_p = permutation_test(damage_a, damage_b, resamples, seed)
    row = {
        **{"model_a": model_a, "model_b": model_b, "condition": condition},
        **{"seeds_a": len(a), "seeds_b": len(b), "num_documents": len(a[0].documents_D)},
        **{"delta_nats": delta, "low": delta - half, "high": delta + half, "p": p, "min_p": min_p},
    }
    return pd.DataFrame([row])


def _damage(p: Pairs, condition: str) -> float:
    return p.delta_D(condition).sum() / p.tokens_D.sum()


def _two_level(
    runs: list[Pairs], condition: str, resamples: int, seed: int, rng: np.random.Generator
) -> np.ndarray:
    """Mean damage over runs drawn by rng on documents drawn by seed, (R,)."""
    ratios_RS = resampled_ratios(
        np.array([p.delta_D(condition) for p in runs]),
        np.array([p.tokens_D for p in runs]),
        resamples,
        seed,
    )
    # n - 1 draws out of n (Rao and Wu, JASA 83, 1988): n draws understate the variance of a mean
    # by the factor (n - 1) / n, a half for two seeds.
    picks = rng.integers(len(runs), size=(resamples, len(runs) - 1))
    return np.take_along_axis(ratios_RS, picks, axis=1).mean(axis=1)


def permutation_test(
    a: np.ndarray, b: np.ndarray, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Two-sided p of the difference of means, and the smallest p that the sizes allow.

    All splits are tried where there are no more than `resamples`, else that many random ones.
    """
    pooled, size = np.concatenate([a, b]), len(a)
    splits = comb(len(pooled), size)
    if splits <= resamples:
        chosen = np.array(list(combinations(range(len(pooled)), size)))
        sums = pooled[chosen].sum(axis=1)
    else:
        splits = resamples + 1  # the observed one counts
        rng = np.random.default_rng(seed)
        shuffled = rng.permuted(np.tile(pooled, (resamples, 1)), axis=1)
        sums = np.append(shuffled[:, :size].sum(axis=1), a.sum())
    slack = 1e-12 * np.abs(pooled).sum()  # sums that are equal but for rounding are ties
    tail = min((sums >= a.sum() - slack).sum(), (sums <= a.sum() + slack).sum())
    return min(1.0, 2 * tail / splits), min(1.0, 2 / splits)
