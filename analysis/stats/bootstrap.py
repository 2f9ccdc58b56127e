"""Intervals of ratios of sums, resampling whole documents.

A resample is a row of counts (how often each document counts), so every sum of every
condition comes from one matrix product, and all conditions see the same resamples. The bounds
are those of scipy.stats.bootstrap(paired=True, method="BCa") with the same resamples, ten times as
fast for thirty conditions on 150 documents.

Shapes: R resamples, C ratios, D documents, M contrasts of ratios.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy.special import ndtr, ndtri

Strata: TypeAlias = tuple[np.ndarray, ...]  # numbers of the documents of each
CHUNK = 2**22  # numbers in one block of counts: 32 MiB, however many documents there are


class Intervals(NamedTuple):
    """M estimates, and the bounds of their intervals."""

    value_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray

    def columns(self, value: str, *bounds: str) -> dict[str, np.ndarray]:
        """As columns of a table; bounds are called VALUE_low and VALUE_high, or as given."""
        names = value, *(bounds or (f"{value}_low", f"{value}_high"))
        return dict(zip(names, self, strict=True))


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: their confidence, from how many resamples, drawn with which seed.

    Tests that permute or flip signs draw as many, with the same seed. `within` keeps resamples
    within strata. Raises `ValueError` for a confidence outside of (0, 1) or less than one resample.
    """

    confidence: float = 0.95
    resamples: int = 9999
    seed: int = 0
    strata: Strata | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        object.__setattr__(self, "confidence", float(self.confidence))
        for name, least in {"resamples": 1, "seed": 0}.items():
            value = getattr(self, name)
            object.__setattr__(self, name, whole(name, value, least))

    @property
    def tails(self) -> tuple[float, float]:
        """Shares below the bounds of an interval: 0.025 and 0.975 for a confidence of 0.95."""
        return (1 - self.confidence) / 2, (1 + self.confidence) / 2

    def within(self, stratum_D: np.ndarray) -> Bootstrap:
        """The same for these documents, of which as many as there are of each stratum are drawn
        from it: text is sampled domain by domain, too. Strata of one document go together."""
        _, number_D, size_S = np.unique(stratum_D, return_inverse=True, return_counts=True)
        number_D = np.where(size_S[number_D] == 1, -1, number_D)
        if (number_D == -1).sum() == 1:  # alone it would never change: it joins the largest
            number_D[number_D == -1] = size_S.argmax()
        numbers = np.unique(number_D)
        return replace(self, strata=tuple(np.flatnonzero(number_D == s) for s in numbers))

    def blocks(self, size: int) -> Iterator[int]:
        """Numbers of resamples to be held at once at `size` numbers each, in all `resamples`."""
        step = max(1, CHUNK // size)
        for start in range(0, self.resamples, step):
            yield min(step, self.resamples - start)

    def document_counts(self, documents: int) -> Iterator[np.ndarray]:
        """Blocks (r, D) of how often each document counts, `resamples` rows in all.

        Of the n documents of a stratum n - 1 are drawn, with replacement, and each draw counts
        n / (n - 1) times (Rao and Wu, JASA 83, 1988): drawing n would leave out a share of 1 / n
        of the variance, which is much where a domain has few documents.
        """
        rng = np.random.default_rng(self.seed)
        for rows in self.blocks(documents):
            counts_RD = np.empty((rows, documents))
            for own in self._strata(documents):
                n = len(own)
                picks = rng.integers(n, size=(rows, n - 1))
                cells = picks + n * np.arange(rows)[:, None]
                counts = np.bincount(cells.ravel(), minlength=rows * n)
                counts_RD[:, own] = counts.reshape(rows, n) * (n / (n - 1))
            yield counts_RD

    def _strata(self, documents: int) -> Strata:
        return (np.arange(documents),) if self.strata is None else self.strata

    def ratios(self, numerator_CD: np.ndarray, denominator_CD: np.ndarray) -> np.ndarray:
        """sum(numerator) / sum(denominator) in every resample, (R, C)."""
        blocks = self.document_counts(numerator_CD.shape[1])
        return np.concatenate([(n @ numerator_CD.T) / (n @ denominator_CD.T) for n in blocks])

    def intervals(
        self,
        numerator_CD: np.ndarray,
        denominator_CD: np.ndarray,
        contrast_CM: np.ndarray | None = None,
    ) -> Intervals:
        """Sum(numerator) / sum(denominator) per row, or contrasts of them, with BCa intervals.

        Fewer than two documents give NaN bounds. A row that is not known (NaN) gives NaN, and so
        does each contrast that it has a part in.
        """
        unknown_C = np.isnan(numerator_CD).any(axis=1)
        if unknown_C.any() and contrast_CM is not None:
            known = self.intervals(np.nan_to_num(numerator_CD), denominator_CD, contrast_CM)
            unknown_M = (contrast_CM[unknown_C] != 0).any(axis=0)
            return Intervals(*(np.where(unknown_M, np.nan, values_M) for values_M in known))
        total_C, weight_C = numerator_CD.sum(axis=1), denominator_CD.sum(axis=1)
        ratio_C = total_C / weight_C
        value_M = ratio_C if contrast_CM is None else ratio_C @ contrast_CM
        if numerator_CD.shape[1] < 2:
            return Intervals(value_M, *np.full((2, len(value_M)), np.nan))
        draws_RM = self.ratios(numerator_CD, denominator_CD)
        left_out_DM = (total_C - numerator_CD.T) / (weight_C - denominator_CD.T)
        scale_M = np.abs(ratio_C)
        # Without contrasts a ratio that is not finite must not spoil the others.
        if contrast_CM is not None:
            draws_RM, left_out_DM = draws_RM @ contrast_CM, left_out_DM @ contrast_CM
            scale_M = scale_M @ np.abs(contrast_CM)
        influence_DM = np.empty_like(left_out_DM)
        for own in self._strata(len(left_out_DM)):
            mean_M = left_out_DM[own].mean(axis=0)
            influence_DM[own] = (mean_M - left_out_DM[own]) * (len(own) - 1) / len(own)
        columns = zip(value_M, draws_RM.T, influence_DM.T, scale_M, strict=True)
        bounds_M2 = np.reshape([bca(*column, self.tails) for column in columns], (-1, 2))
        return Intervals(value_M, *bounds_M2.T)


def whole(name: str, value: object, least: int) -> int:
    """The number, of whatever library, as an int. Raises `ValueError` naming it unless it is whole
    and at least `least`; True is none."""
    try:
        number = least - 1 if is_truth(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name} is {value!r}; it must be at least {least}, a whole number")
    return number


def is_truth(value: object) -> bool:
    """Whether it is True or False, of whatever library."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def is_number(value: object) -> bool:
    """Whether it is one number, of whatever library; True is none."""
    return hasattr(value, "__float__") and not is_truth(value) and np.ndim(value) == 0  # type: ignore[arg-type]


def check_confidence(confidence: float) -> None:
    """Raise `ValueError` with the value unless it lies strictly between 0 and 1."""
    if not (is_number(confidence) and 0 < confidence < 1):
        raise ValueError(f"confidence is {confidence!r}; it must lie strictly between 0 and 1")


def bca(
    value: float,
    draws_R: np.ndarray,
    influence_D: np.ndarray,
    scale: float,
    tails: tuple[float, float],
) -> tuple[float, float]:
    """Bounds of Efron's BCa interval (JASA 82, 1987), `tails` as in `Bootstrap`.

    influence_D   of each document: how far the value without it lies below the mean of such values
                  in its stratum, times (n - 1) / n of the stratum, as scipy has it for samples

    When no document moves the value there is nothing to resample: both bounds are the value.
    Where BCa is undefined (all resamples on one side of the value, or an acceleration that
    reverses the order of the quantiles) the bounds are those of the percentile interval.
    """
    rounding = 1e-12 * scale
    if np.ptp(influence_D) <= rounding:
        return value, value
    # Draws that equal the value count a half. Where documents have few different values they are
    # common, and which side the last bit puts them on must not matter.
    share_below = np.mean([draws_R < value - rounding, draws_R <= value + rounding])
    acceleration = (influence_D**3).sum() / (6 * (influence_D**2).sum() ** 1.5)
    if 0 < share_below < 1:
        bias = ndtri(share_below)
        shifted = bias + ndtri(tails)
        if (acceleration * shifted < 1).all():
            tails = ndtr(bias + shifted / (1 - acceleration * shifted))
    low, high = np.quantile(draws_R, tails)
    return low, high
