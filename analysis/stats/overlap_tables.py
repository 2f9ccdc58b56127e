"""Tables of overlap: what their rows are of besides a site, and pairs as a square."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import pandas as pd

SHARED = -1  # the number of a shared expert
INDEX = {"experts": ["expert"], "sites": [], "pairs": ["expert_i", "expert_j"]}


def square(rows: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """Experts i by experts j of one site's pairs, a shared expert last; NaN where there is none."""
    table = rows.pivot(index="expert_i", columns="expert_j", values=column)
    return table.reindex(index=shared_last(table.index), columns=shared_last(table.columns))


def shared_last(experts: Iterable[int]) -> list[Hashable]:
    """Numbers of experts in order, that of a shared one at the end."""
    return sorted(experts, key=lambda expert: (expert == SHARED, expert))


def check_one_step(rows: pd.DataFrame) -> None:
    """Raise `ValueError` with the steps of training if there are several."""
    if "step" in rows and rows.step.nunique() > 1:
        steps = rows.step.unique().tolist()
        raise ValueError(f"step has several values, {steps}; take one with .at(step)")
