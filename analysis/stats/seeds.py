"""Two models compared over their training runs, not only over the documents of one."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.damage import by_seed, check_documents
from analysis.stats.pairs import Pairs, pair

# Of S training runs on the same D documents: the nats that a condition adds, and tokens, (S, D).
Runs = tuple[np.ndarray, np.ndarray]


def over_seeds(
    losses: pd.DataFrame,
    model_a: str,
    model_b: str,
    condition: str,
    bootstrap: Bootstrap = Bootstrap(),
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
    pairs = pair(losses)
    a = list(by_seed(pairs, "model_a", model_a).values())
    b = list(by_seed(pairs, "model_b", model_b).values())
    check_documents(a + b)
    runs_a, runs_b = runs_of(a, condition), runs_of(b, condition)
    bootstrap = bootstrap.within(a[0].domain_D)
    delta, low, high = two_level(runs_a, runs_b, bootstrap)
    p, min_p = permutation_test(ratios(runs_a), ratios(runs_b), bootstrap)
    row = {
        **{"model_a": model_a, "model_b": model_b, "condition": condition},
        **{"seeds_a": len(a), "seeds_b": len(b), "num_documents": len(a[0].documents_D)},
        **{"delta_nats": delta, "low": low, "high": high, "p": p, "min_p": min_p},
    }
    return pd.DataFrame([row])


def runs_of(side: list[Pairs], condition: str) -> Runs:
    """Of the checkpoints of one model."""
    return np.array([p.delta_D(condition) for p in side]), np.array([p.tokens_D for p in side])


def ratios(side: Runs) -> np.ndarray:
    """(S,) nats per token that the condition adds."""
    delta_SD, tokens_SD = side
    return delta_SD.sum(axis=1) / tokens_SD.sum(axis=1)


def two_level(a: Runs, b: Runs, bootstrap: Bootstrap) -> tuple[float, float, float]:
    """Mean of the runs' ratios in a minus that in b, and its bounds; see `over_seeds`."""
    delta = ratios(a).mean() - ratios(b).mean()
    numbers = [len(delta_SD) for delta_SD, _ in (a, b)]
    if min(*numbers, a[0].shape[1] - 1) < 2:
        return delta, np.nan, np.nan
    rng = np.random.default_rng([bootstrap.seed, 1])
    mean_a, mean_b = (_resampled_mean(side, bootstrap, rng) for side in (a, b))
    spread = np.std(mean_a - mean_b, ddof=1)
    half = spread * stdtrit(sum(numbers) - 2, bootstrap.tails[1])
    return delta, delta - half, delta + half


def _resampled_mean(side: Runs, bootstrap: Bootstrap, rng: np.random.Generator) -> np.ndarray:
    """Mean ratio over runs drawn by rng on documents drawn by the bootstrap, (R,)."""
    ratios_RS = bootstrap.ratios(*side)
    # n - 1 draws out of n (Rao and Wu, JASA 83, 1988): n draws understate the variance of a mean
    # by the factor (n - 1) / n, a half for two seeds.
    runs = ratios_RS.shape[1]
    picks = rng.integers(runs, size=(bootstrap.resamples, runs - 1))
    return np.take_along_axis(ratios_RS, picks, axis=1).mean(axis=1)


def sign_flip_test(
    differences_D: np.ndarray, bootstrap: Bootstrap = Bootstrap()
) -> tuple[float, float]:
    """Two-sided p of a sum of paired differences, and the smallest p that their number allows.

    Under the null hypothesis each difference is as likely to have the other sign. All signs are
    tried where there are no more than `bootstrap.resamples`, else that many random ones. p is NaN
    where a difference is.
    """
    size, total = len(differences_D), np.abs(differences_D).sum()
    if 2**size <= bootstrap.resamples:
        sums = np.array(list(product((1, -1), repeat=size))) @ differences_D
        fewest = 2  # the observed signs and their mirror image
    else:
        rng = np.random.default_rng(bootstrap.seed)
        signs = (2.0 * rng.integers(2, size=(rows, size)) - 1 for rows in bootstrap.blocks(size))
        drawn = [some_RD @ differences_D for some_RD in signs]
        # The observed signs count, too.
        sums, fewest = np.concatenate([[differences_D.sum()], *drawn]), 1
    p = (np.abs(sums) >= abs(differences_D.sum()) - 1e-12 * total).mean()
    return np.nan if np.isnan(total) else float(p), min(1.0, fewest / len(sums))


def permutation_test(
    a: np.ndarray, b: np.ndarray, bootstrap: Bootstrap = Bootstrap()
) -> tuple[float, float]:
    """Two-sided p of the difference of means, and the smallest p that the sizes allow.

    All splits are tried where there are no more than `bootstrap.resamples`, else so many random
    ones. p is NaN where a number is.
    """
    pooled, size = np.concatenate([a, b]), len(a)
    splits = comb(len(pooled), size)
    if splits <= bootstrap.resamples:
        chosen = np.array(list(combinations(range(len(pooled)), size)))
        sums = pooled[chosen].sum(axis=1)
    else:
        splits = bootstrap.resamples + 1  # the observed one counts
        rng = np.random.default_rng(bootstrap.seed)
        shuffled = rng.permuted(np.tile(pooled, (bootstrap.resamples, 1)), axis=1)
        sums = np.append(shuffled[:, :size].sum(axis=1), a.sum())
    slack = 1e-12 * np.abs(pooled).sum()  # sums that are equal but for rounding are ties
    tail = min((sums >= a.sum() - slack).sum(), (sums <= a.sum() + slack).sum())
    p = np.nan if np.isnan(slack) else min(1.0, 2 * tail / splits)
    return p, min(1.0, 2 / splits)
