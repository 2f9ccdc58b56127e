"""Damage by position in the sequence, frequency of the target, or domain."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import GREY
from analysis.plots.style import DELTA, canvas, model_styles, rows_of, table_of, widen_scale
from analysis.stats.pairs import CHECKPOINT

X = {
    "position": "position in the sequence",
    "frequency": "times that the target occurs in the data",
    "domain": "domain",
}


def group_curve(
    frame: pd.DataFrame | Any,
    by: str = "position",
    condition: str = "DropTop(1)",
    ax: Axes | None = None,
) -> Axes:
    """Damage of groups of tokens with intervals over documents, a line per checkpoint.

    frame   the table of `stats.damage_by`, or a Results; the line breaks between domains, which
            have no order. Raises `ValueError` for an unknown condition.
    """
    columns = ["condition", "by", "group", "order", "delta_nats", "low", "high"]
    frame = table_of(frame, "damage_by", columns, by, [condition])
    styles = model_styles(frame)
    frame = rows_of(frame, condition)
    by = frame.by.iloc[0]
    groups = frame.drop_duplicates("group").sort_values("order").group.tolist()
    models, seen = list(styles), set()
    with canvas(ax, height=2.5) as ax:
        for (model, *_), rows in frame.groupby(CHECKPOINT, sort=False):
            look = styles[model] | ({"linestyle": ""} if by == "domain" else {})
            shift = 0.4 * ((models.index(model) + 0.5) / len(models) - 0.5)
            x = rows.group.map(groups.index) + shift
            ax.plot(x, rows.delta_nats, label=f"_{model}" if model in seen else model, **look)
            ax.vlines(x, rows.low, rows.high, color=look["color"], lw=0.8)
            seen.add(model)
        ax.axhline(0, color=GREY, lw=0.6, zorder=0.5)
        widen_scale(ax.yaxis, frame.delta_nats)
        turned = sum(map(len, groups)) > 28
        turn = dict(rotation=40, ha="right", rotation_mode="anchor") if turned else {}
        ax.set_xticks(range(len(groups)), groups, **turn)
        ax.set_xlabel(X[by])
        ax.set_ylabel(DELTA)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
