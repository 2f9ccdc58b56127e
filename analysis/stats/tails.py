"""How unevenly damage is spread over tokens: means hide that tails are heavy."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from analysis.stats.tokens import Tokens, check_tokens, rises

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
WORST = (0.01, 0.1)
ROUNDING = float(np.finfo(np.float32).eps)  # of a loss, relative


def tails(
    losses: pd.DataFrame, tokens: Tokens | None, conditions: Collection[str] | None = None
) -> pd.DataFrame:
    """The rise of single tokens' losses: one row per checkpoint and condition (labels; None: all).

    model, family, train_seed, condition, num_tokens
    mean, q0.01, q0.1, q0.5, q0.9, q0.99, q0.999, max     nats
    rising                     share of tokens that got worse
    worst_0.01, worst_0.1      share of the whole damage that the worst 1 % and 10 % of tokens
                               carry; above 1 where the others gain, NaN where there is no
                               damage beyond the rounding of the losses

    Every eval_seed counts as tokens of its own. Raises `ValueError` if tokens were not kept.
    """
    check_tokens(tokens)
    rows = []
    for p, clean, name, rise_VN in rises(losses, tokens, conditions):
        rise, least = np.sort(rise_VN, axis=None)[::-1], ROUNDING * clean.nll_N.mean()
        rows.append(
            p.checkpoint
            | {"condition": name, "num_tokens": len(rise), "mean": rise.mean()}
            | {f"q{q:g}": np.quantile(rise, q) for q in QUANTILES}
            | {"max": rise[0], "rising": (rise > 0).mean()}
            | {f"worst_{share:g}": _carried(rise, share, least) for share in WORST}
        )
    return pd.DataFrame(rows)


def tail_curve(
    losses: pd.DataFrame,
    tokens: Tokens | None,
    conditions: Collection[str] | None = None,
    points: int = 60,
) -> pd.DataFrame:
    """The same as curves: model, family, train_seed, condition, share (of tokens, the worst
    first, from one token to all on a logarithmic grid), rise (the least among them, in nats) and
    carried (their share of the whole damage). Raises `ValueError` if tokens were not kept."""
    check_tokens(tokens)
    tables = []
    for p, clean, name, rise_VN in rises(losses, tokens, conditions):
        rise, least = np.sort(rise_VN, axis=None)[::-1], ROUNDING * clean.nll_N.mean()
        count = np.unique(np.geomspace(1, len(rise), points).round().astype(int))
        carried = [_carried(rise, n / len(rise), least) for n in count]
        tables.append(
            pd.DataFrame(
                p.checkpoint
                | {"condition": name, "share": count / len(rise)}
                | {"rise": rise[count - 1], "carried": carried}
            )
        )
    return pd.concat(tables, ignore_index=True)


def _carried(falling: np.ndarray, share: float, least: float) -> float:
    """By the worst tokens, at least one; NaN if the mean rise is below `least`."""
    worst = max(1, round(share * len(falling)))
    return falling[:worst].sum() / falling.sum() if falling.mean() > least else np.nan
