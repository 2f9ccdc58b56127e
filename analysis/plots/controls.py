"""What disabling the first choice costs, beside the controls that give it its meaning."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Look, checkpoint_names, dot_rows, figure_height
from analysis.plots.style import canvas, model_styles, table_of
from analysis.stats import CHECKPOINT, CONDITION, find

# In the order of the damage that a working router should show; only the subject is filled.
CONDITIONS = {
    "DropUnchosen(1)": Look("v", False),
    "DropChosen(1)": Look("^", False),
    "DropTop(1)": Look("o"),
    "RandomRouting": Look("s", False),
    "NoRouted": Look("x", False),
}


def control_dots(frame: pd.DataFrame | Any, ax: Axes | None = None) -> Axes:
    """DropTop(1) beside DropUnchosen, DropChosen, RandomRouting and NoRouted, per checkpoint.

    Everywhere at once and on logits, with intervals; RandomRouting at its greatest strength.
    A number behind a model's name is its train_seed. Raises `ValueError` if none was run.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    checkpoints: list[tuple[str, str]] = []
    cells: dict[Any, Any] = {}
    for key, mine in frame.groupby(CHECKPOINT, sort=False):
        found = {name: find(mine, name) for name in CONDITIONS}
        row = {(len(checkpoints), name): f.iloc[-1] for name, f in found.items() if len(f)}
        if row:
            checkpoints.append(key)
            cells |= row
    if not cells:
        raise ValueError(f"frame has none of the conditions {', '.join(CONDITIONS)}")
    names = checkpoint_names(pd.DataFrame(checkpoints, columns=CHECKPOINT))
    rows = [
        (name, styles[model]["color"]) for name, (model, *_) in zip(names, checkpoints, strict=True)
    ]
    with canvas(ax, figure_height(len(rows))) as ax:
        dot_rows(ax, rows, CONDITIONS, cells)
    return ax
