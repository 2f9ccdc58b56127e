"""Damage with and without the cascade through later routers."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Look, dot_rows, figure_height, groups_of
from analysis.plots.style import canvas, model_styles, rows_of, table_of

PARTS = {"reroute": Look("o"), "replay": Look("o", False), "cascade": Look("D", False)}


def cascade_dots(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Damage where later routers reroute, where they repeat the clean run, and the difference.

    frame   the table of `stats.cascade`, or a Results; condition: a label, None: all, a row each
    """
    frame = table_of(frame, "cascade", ["condition", "part", "delta_nats"])
    styles = model_styles(frame)
    frame = rows_of(frame, condition)
    names: list[tuple[str, str]] = []
    cells: dict[Any, Any] = {}
    for title, model, rows in groups_of(frame):
        cells |= {(len(names), row.part): row for _, row in rows.iterrows()}
        names.append((title, styles[model]["color"]))
    with canvas(ax, figure_height(len(names))) as ax:
        dot_rows(ax, names, PARTS, cells, columns=3)
    return ax
