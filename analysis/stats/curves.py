"""A damage curve in a few numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.pairs import CHECKPOINT, CONDITION, PLAIN, check_choice, check_columns, control

CURVE = [*CHECKPOINT, *(column for column in CONDITION if column != "strength")]


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
    value given, the largest dose tried. Point estimates; for intervals, read the curve's own.
    Raises `ValueError` for missing columns or a perturbation that is not there.
    """
    check_columns("damage", damage, [*CURVE, "name", "strength", "delta_nats", x])
    check_choice("perturbation", perturbation, damage.perturbation.unique())
    rows = damage[damage.perturbation == perturbation]
    curves = [(key, _points(curve, x)) for key, curve in rows.groupby(CURVE, sort=False)]
    top = min(dose[-1] for _, (dose, _) in curves) if upto is None else upto
    ceiling = {}
    for place, rows in damage.groupby([*CHECKPOINT, "where"]):
        random = control(rows.assign(where=PLAIN["where"]), "RandomRouting")
        ceiling[place] = random.delta_nats.iloc[-1] if len(random) else np.nan
    out = []
    for key, (dose, nats) in curves:
        row = dict(zip(CURVE, key, strict=True))
        inside = dose < top
        grid = np.append(dose[inside], top)
        heights = np.append(nats[inside], np.interp(top, dose, nats))
        row["dose_high"] = top
        row["area"] = np.trapezoid(heights, grid) if dose[-1] >= top else np.nan
        row["dose_ln2"], row["ln2_censored"] = _reaches(dose, nats, np.log(2))
        half = ceiling[(*(row[c] for c in CHECKPOINT), row["where"])] / 2
        row["dose_half_random"], row["half_random_censored"] = _reaches(dose, nats, half)
        out.append(row)
    return pd.DataFrame(out)


def _points(curve: pd.DataFrame, x: str) -> tuple[np.ndarray, np.ndarray]:
    curve = curve.dropna(subset=[x, "delta_nats"]).sort_values(x)
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
