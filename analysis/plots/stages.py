"""Which routers and which reading of "disabled": all stages and each alone, both mask points."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Look, checkpoint_names, dot_rows, figure_height
from analysis.plots.style import canvas, model_styles, table_of
from analysis.stats import CHECKPOINT, CONDITION, PLAIN, check_choice, label

POINTS = {"logits": Look("o"), "scores": Look("D", False)}


def stage_dots(
    frame: pd.DataFrame | Any, condition: str = "DropTop(1)", ax: Axes | None = None
) -> Axes:
    """One condition everywhere and at each stage alone, masked before or after the scores.

    A checkpoint with a single stage has one row: that stage alone is everywhere. Raises
    `ValueError` listing the conditions if this one was not run everywhere or at a stage.
    """
    frame = table_of(frame, "damage", [*CONDITION, "delta_nats"])
    is_site = (frame["where"] == "all") | frame["where"].str.match(r"stage \d+$")
    plain = (frame.effect == PLAIN["effect"]) & (frame.downstream == PLAIN["downstream"])
    rows = frame[is_site & plain & frame.point.isin(list(POINTS))]
    base = label(rows.assign(where=PLAIN["where"], point=PLAIN["point"]))
    check_choice("condition", condition, base.unique())
    rows = rows[base == condition]
    styles = model_styles(frame)
    checkpoints = rows[CHECKPOINT].drop_duplicates(ignore_index=True)
    names: list[tuple[str, str]] = []
    cells: dict[Any, Any] = {}
    for name, key in zip(checkpoint_names(checkpoints), checkpoints.to_numpy(), strict=True):
        mine = rows[(rows[CHECKPOINT] == key).all(axis=1)]
        places = sorted(mine["where"].unique())  # "all" comes first
        if len(places) == 2 and "all" in places:
            places = ["all"]
        for place in places:
            for _, row in mine[mine["where"] == place].iterrows():
                cells[len(names), row.point] = row
            names.append((name if place == places[0] else place, styles[key[0]]["color"]))
    with canvas(ax, figure_height(len(names))) as ax:
        dot_rows(ax, names, POINTS, cells)
        ax.legend_.set_title("mask on")
    return ax
