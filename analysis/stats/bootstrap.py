"""Intervals of ratios of sums, resampling whole documents.

A resample is a row of counts (how often each document was drawn), so every sum of every
condition comes from one matrix product, and all conditions see the same resamples. The bounds
are those of scipy.stats.bootstrap(paired=True, method="BCa") with the same draws, ten times as
fast for thirty conditions on 150 documents.

Shapes: R resamples, C ratios, D documents, M contrasts of ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

CHUNK = 2**22  # numbers in one block of counts: 32 MiB, however many documents there are


class Intervals(NamedTuple):
    """M estimates, and the bounds of their intervals."""

    value_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray


def check_resampling(confidence: float, resamples: int) -> None:
    """Raise `ValueError` naming the parameter and the value where it cannot serve."""
    if not (isinstance(confidence, Real) and 0 < confidence < 1):
        raise ValueError(f"confidence is {confidence!r}; it must lie strictly between 0 and 1")
    if not (isinstance(resamples, Integral) and resamples >= 1):
        raise ValueError(f"resamples is {resamples!r}; it must be at least 1, a whole number")


def document_counts(documents: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (r, D) of draws with replacement, `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // documents)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        picks = rng.integers(documents, size=(rows, documents))
        cells = picks + documents * np.arange(rows)[:, None]
        counts = np.bincount(cells.ravel(), minlength=rows * documents)
        yield counts.reshape(rows, documents).astype(float)


def resampled_ratios(
    numerator_CD: np.ndarray, denominator_CD: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """sum(numerator) / sum(denominator) in every resample, (R, C)."""
    blocks = document_counts(numerator_CD.shape[1], resamples, seed)
    return np.concatenate([(n @ numerator_CD.T) / (n @ denominator_CD.T) for n in blocks])


def intervals(
    numerator_CD: np.ndarray,
    denominator_CD: np.ndarray,
    contrast_CM: np.ndarray | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Intervals:
    """Sum(numerator) / sum(denominator) per row, or contrasts of them, with BCa intervals.

    Fewer than two documents give NaN bounds. Raises `ValueError` for a confidence outside of
    (0, 1) or less than one resample.
    """
    check_resampling(confidence, resamples)

    def contrasts(ratios_XC: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
        # Without contrasts a ratio that is not finite must not spoil the others.
        return ratios_XC if factors is None else ratios_XC @ factors

    total_C, weight_C = numerator_CD.sum(axis=1), denominator_CD.sum(axis=1)
    value_M = contrasts(total_C / weight_C, contrast_CM)
    if numerator_CD.shape[1] < 2:
        return Intervals(value_M, *np.full((2, len(value_M)), np.nan))
    draws_RC = resampled_ratios(numerator_CD, denominator_CD, resamples, seed)
    draws_RM = contrasts(draws_RC, contrast_CM)
    left_out_DC = (total_C - numerator_CD.T) / (weight_C - denominator_CD.T)
    left_out_DM = contrasts(left_out_DC, contrast_CM)
    sizes_CM = None if contrast_CM is None else np.abs(contrast_CM)
    scale_M = contrasts(np.abs(total_C / weight_C), sizes_CM)
    columns = zip(value_M, draws_RM.T, left_out_DM.T, scale_M, strict=True)
    bounds_M2 = np.reshape([bca(*column, confidence) for column in columns], (-1, 2))
    return Intervals(value_M, *bounds_M2.T)


def bca(
    value: float, draws_R: np.ndarray, left_out_D: np.ndarray, scale: float, confidence: float
) -> tuple[float, float]:
    """Bounds of Efron's BCa interval (JASA 82, 1987).

    When no document moves the value there is nothing to resample: both bounds are the value.
    Where BCa is undefined (all resamples on one side of the value, or an acceleration that
    reverses the order of the quantiles) the bounds are those of the percentile interval.
    """
    rounding = 1e-12 * scale
    if np.ptp(left_out_D) <= rounding:
        return value, value
    # Draws that equal the value count a half. With few documents they are common (each document
    # drawn once), and which side the last bit puts them on must not matter.
    share_below = np.mean([draws_R < value - rounding, draws_R <= value + rounding])
    influence_D = left_out_D.mean() - left_out_D
    acceleration = (influence_D**3).sum() / (6 * (influence_D**2).sum() ** 1.5)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if 0 < share_below < 1:
        bias = ndtri(share_below)
        shifted = bias + ndtri(tails)
        if (acceleration * shifted < 1).all():
            tails = ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(draws_R, tails)
    return low, high
