"""A condition's damage beside what other conditions of the same checkpoint make of it.

The tables of split.py, cascade.py and gap.py have one form, a row a part:

    model, family, train_seed, condition     a checkpoint, and the label of what is taken apart
    part                                     its name
    delta_nats, low, high                    nats per token, BCa over documents
    share, share_low, share_high             of the whole's damage, the same as a ratio of sums;
                                             without bounds where that of the whole may be 0

Shapes: P parts, C conditions, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.pairs import CHECKPOINT, Pairs, check_choice

COLUMNS = [
    *CHECKPOINT, "condition", "part", "delta_nats", "low", "high",
    "share", "share_low", "share_high",
]  # fmt: skip
Needs = Callable[[Pairs, str], Iterable[str]]


def choose(
    pairs: list[Pairs], condition: str | None, needs: Needs, how: str
) -> list[tuple[Pairs, str]]:
    """The checkpoints and conditions for which all that is needed was run.

    condition   a label, or None: all there are, which may be none
    needs       (checkpoint, label) -> the labels that are needed; empty for no such condition
    how         what to measure, for the error

    Raises `ValueError` for a label that no checkpoint has, or for which something is missing in
    every checkpoint.
    """
    if condition is not None:
        known = dict.fromkeys(name for p in pairs for name in p.conditions.label)
        check_choice("condition", condition, known)
    found, missing = [], {}
    for p in pairs:
        have = p.conditions.label.tolist()
        for name in have if condition is None else [n for n in have if n == condition]:
            needed = list(needs(p, name))
            missing |= dict.fromkeys(n for n in needed if n not in have)
            if needed and all(n in have for n in needed):
                found.append((p, name))
    if condition is not None and not found:
        lacks = f"lacks {', '.join(map(repr, missing))}" if missing else "is no such condition"
        raise ValueError(f"condition {condition!r} {lacks}; measure {how}")
    return found


def combine(
    p: Pairs,
    condition: str,
    parts: Mapping[str, Mapping[str, float]],
    whole: str,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    """Rows of one checkpoint.

    parts   name -> (label of a condition -> its factor): each part is a sum of damages
    whole   the part that the others are shares of
    """
    labels = list(dict.fromkeys(name for part in parts.values() for name in part))
    delta_CD = np.array([p.delta_D(name) for name in labels])
    factors_CP = np.array([[part.get(name, 0.0) for part in parts.values()] for name in labels])
    tokens_CD = np.broadcast_to(p.tokens_D, delta_CD.shape)
    nats = bootstrap.intervals(delta_CD, tokens_CD, factors_CP)
    at = list(parts).index(whole)
    part_PD = factors_CP.T @ delta_CD
    whole_PD = np.broadcast_to(part_PD[at], part_PD.shape)
    # A whole of 0 has no shares, and in a resample it may be 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = bootstrap.intervals(part_PD, whole_PD)
    bounded = nats.low_M[at] > 0 or nats.high_M[at] < 0
    low_P, high_P = (b if bounded else np.full(len(parts), np.nan) for b in share[1:])
    return pd.DataFrame(
        p.checkpoint
        | {"condition": condition, "part": list(parts)}
        | dict(zip(("delta_nats", "low", "high"), nats, strict=True))
        | {"share": share.value_M, "share_low": low_P, "share_high": high_P}
    )


def stack(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One below the other; an empty table with its columns for none."""
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
