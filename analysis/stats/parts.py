"""A condition's damage beside what other conditions of the same checkpoint make of it.

The tables of apart.py have one form, a row a part:

    model, family, train_seed, condition     a checkpoint, and the label of what is taken apart
    part                                     its name
    num_documents                            that intervals are over
    delta_nats, low, high                    nats per token, BCa over documents
    share, share_low, share_high             of the whole's damage, the same as a ratio of sums;
                                             without bounds where that of the whole may be 0

Shapes: P parts, C conditions, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, Intervals
from analysis.stats.columns import CHECKPOINT, label
from analysis.stats.doses import doses
from analysis.stats.pairs import Losses, Pairs, chosen

COLUMNS = [
    *CHECKPOINT, "condition", "part", "num_documents", "delta_nats", "low", "high",
    "share", "share_low", "share_high",
]  # fmt: skip
# Name of a part -> (label of a condition -> its factor): each part is a sum of damages.
Parts = Mapping[str, Mapping[str, float]]


def choose(
    losses: Losses, condition: str | None, parts_of: Callable[[Pairs, str], Parts], how: str
) -> Iterator[tuple[Pairs, str, Parts]]:
    """The checkpoints and conditions all of whose parts were run, and these parts.

    condition   a label, or None: all there are, which may be none
    parts_of    (checkpoint, label) -> its parts; empty for no such condition
    how         what to measure, for the error

    Raises `ValueError` for a label that no checkpoint has, or for which something is missing in
    every checkpoint.
    """
    found = False
    missing: dict[str, None] = {}
    for p, names in chosen(losses, None if condition is None else [condition]):
        for name in names:
            parts = parts_of(p, name)
            lacks = [label for label in _labels(parts) if label not in p.by_label]
            missing |= dict.fromkeys(lacks)
            if parts and not lacks:
                found = True
                yield p, name, parts
    if condition is not None and not found:
        said = f"lacks {', '.join(map(repr, missing))}" if missing else "is no such condition"
        raise ValueError(f"condition {condition!r} {said}; measure {how}")


def combine(
    p: Pairs, condition: str, parts: Parts, whole: str, bootstrap: Bootstrap
) -> pd.DataFrame:
    """Rows of one checkpoint; `whole` is the part that the others are shares of.

    Beside the columns of every such table `label`, of a part that is one condition's damage.
    """
    labels = _labels(parts)
    delta_CD = np.array([p.delta_D(name) for name in labels])
    factors_CP = np.array([[part.get(name, 0.0) for part in parts.values()] for name in labels])
    tokens_CD = np.broadcast_to(p.tokens_D, delta_CD.shape)
    bootstrap = bootstrap.within(p.domain_D)
    nats = bootstrap.intervals(delta_CD, tokens_CD, factors_CP)
    at = list(parts).index(whole)
    part_PD = factors_CP.T @ delta_CD
    whole_PD = np.broadcast_to(part_PD[at], part_PD.shape)
    # A whole of 0 has no shares, and in a resample it may be 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = bootstrap.intervals(part_PD, whole_PD)
    if not (nats.low_M[at] > 0 or nats.high_M[at] < 0):
        share = Intervals(share.value_M, *np.full((2, len(parts)), np.nan))
    return pd.DataFrame(
        p.checkpoint
        | {"condition": condition, "part": list(parts)}
        | {"label": [next(iter(part)) if len(part) == 1 else None for part in parts.values()]}
        | {"num_documents": len(p.documents_D)}
        | nats.columns("delta_nats", "low", "high")
        | share.columns("share")
    )


def _labels(parts: Parts) -> list[str]:
    return list(dict.fromkeys(name for part in parts.values() for name in part))


def stack(tables: Iterable[pd.DataFrame], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """One below the other; for none an empty table with these columns."""
    tables = list(tables)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def with_doses(table: pd.DataFrame, routing: pd.DataFrame | None, *columns: str) -> pd.DataFrame:
    """These doses beside the parts that are one condition's damage; the column `label` goes."""
    if routing is not None and len(table):
        dose = doses(routing)
        dose = dose.assign(label=label(dose))[[*CHECKPOINT, "label", *columns]]
        table = table.merge(dose, on=[*CHECKPOINT, "label"], how="left")
    return table.drop(columns="label", errors="ignore")
