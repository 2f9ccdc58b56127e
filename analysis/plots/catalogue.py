"""Every condition of one or more models, a row each."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Look, checkpoint_names, dot_rows, figure_height
from analysis.plots.style import canvas, model_styles, table_of
from analysis.stats import CHECKPOINT, CONDITION, PLAIN, check_choice

ROW, LINE = 0.13, 0.05  # inches of a row beside its models, and of a model in it
WRAP = 32  # characters of a label in one line


def catalogue_dots(
    frame: pd.DataFrame | Any, models: list[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Change of loss under all conditions, with intervals, those of one perturbation together.

    models   by default all; a model's seeds stand in its color in one line. Lines divide
             perturbations; the axis is symlog where a linear one would hide half of them. Raises
             `ValueError` for an unknown model.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    if models is None:
        models = list(styles)
    for model in models:
        check_choice("models", model, styles)
    frame = frame[frame.model.isin(models)]
    labels = _in_order(frame.drop_duplicates("label"))
    checkpoints = frame[CHECKPOINT].drop_duplicates()
    keys = checkpoints.itertuples(index=False, name=None)
    names = dict(zip(keys, checkpoint_names(checkpoints), strict=True))
    series = {
        name: Look(styles[model]["marker"], color=styles[model]["color"])
        for (model, *_), name in names.items()
    }
    row_of = {label: i for i, label in enumerate(labels.label)}
    cells = {(row_of[row.label], names[tuple(row[CHECKPOINT])]): row for _, row in frame.iterrows()}
    rows = [("\n".join(textwrap.wrap(label, WRAP)), "black") for label in row_of]
    lines = max(1 + text.count("\n") for text, _ in rows)
    row = max(ROW + LINE * (len(series) - 1), ROW + 0.09 * (lines - 1))
    with_legend = 0.12 * ((len(series) - 1) // 3)
    height = figure_height(len(rows), row) + with_legend
    with canvas(ax, height) as ax:
        dot_rows(ax, rows, series, cells, columns=3)
        ax.tick_params(axis="y", labelsize=6)
        names = labels["name"]
        starts = [i for i in range(1, len(rows)) if names.iloc[i] != names.iloc[i - 1]]
        for start in starts:
            ax.axhline(start - 0.5, color="#A0A0A0", lw=0.5, zorder=0.2)
    return ax


def _in_order(conditions: pd.DataFrame) -> pd.DataFrame:
    """Perturbations as they come; of each the plain conditions first, then by what is other."""
    order = {name: i for i, name in enumerate(conditions["name"].unique())}
    ranked = conditions.assign(
        rank=conditions["name"].map(order),
        other=(conditions[list(PLAIN)] != list(PLAIN.values())).sum(axis=1),
    )
    return ranked.sort_values(
        ["rank", "other", "downstream", "effect", "point", "where"], kind="stable"
    )
