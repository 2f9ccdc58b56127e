"""What it costs that one expert runs in another's place, and how far the linear estimate holds."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.marks import ZERO, face, legend_above
from analysis.plots.matrices import DIVERGING, centered_scale, color_bar, draw_matrix, name_experts
from analysis.plots.rows import metric_rows, one_site
from analysis.plots.style import COLUMN_WIDTH, PAGE_WIDTH, check_rows, model_styles, sheet
from analysis.stats import SITE, facts_of, square

CHOSEN = {"lowest": ("lowest estimates", True), "random": ("at random", False)}  # name, filled
MEASURED = ["linear", "measured", "low", "high", "chosen"]


def substitution_matrix(
    frame: pd.DataFrame | Any,
    *,
    layer: int,
    stage: int,
    model: str | None = None,
    train_seed: int | None = None,
) -> Figure:
    """The linear estimate of what it costs that expert j runs for i; white costs nothing.

    frame  the table of `analysis.substitution`, or an Overlap (or its table `pairs`) in
           which "substitution" was measured; the former has a second panel, two columns wide in
           all: what real forwards measured against the estimate, with intervals, and the line on
           which both are equal

    In nats per token routed to expert i; red costs, blue gains. model and train_seed: of one of
    several. Raises `ValueError` with the choices for an unknown site or checkpoint, and for frames
    in which later routers were treated in more than one way.
    """
    measured = isinstance(frame, pd.DataFrame) and "linear" in frame
    if measured:
        check_rows("substitution", frame, [*SITE, "expert_i", "expert_j", *MEASURED])
        if "downstream" in frame and frame.downstream.nunique() > 1:
            ways = ", ".join(map(repr, frame.downstream.unique()))
            raise ValueError(f"downstream is {ways} in one frame; give the rows of one of them")
        rows = frame
    else:
        rows = metric_rows(frame, "substitution", "pairs")
    styles = model_styles(rows)
    rows, title = one_site(rows, layer, stage, model, train_seed)
    table = square(rows, "linear" if measured else "value")
    size = (PAGE_WIDTH, 3.0) if measured else (COLUMN_WIDTH, 2.8)
    with sheet(*size) as figure:
        axes = figure.subplots(1, 1 + measured, squeeze=False)[0]
        image = draw_matrix(axes[0], table, centered_scale(table), DIVERGING)
        name_experts(axes[0], "x", table.columns, "by expert j")
        name_experts(axes[0], "y", table.index, "expert i replaced")
        color_bar(image, axes[0], facts_of("substitution").label, shrink=0.9)
        if measured:
            look = styles[rows.model.iloc[0]]
            _calibration(axes[1], rows[rows.measured.notna()], look["color"], look["marker"])
        figure.suptitle(title, fontsize=8)
    return figure


def _calibration(ax: Axes, rows: pd.DataFrame, color: str, marker: str) -> None:
    ax.axline((0, 0), slope=1, **ZERO)
    for chosen, (name, filled) in CHOSEN.items():
        own = rows[rows.chosen == chosen]
        if own.empty:
            continue
        ax.vlines(own.linear, own.low, own.high, color=color, lw=0.7, alpha=0.6)
        ax.plot(own.linear, own.measured, marker, **face(color, filled), mew=0.9, label=name)
    ax.set_xlabel("linear estimate (nats per routed token)")
    ax.set_ylabel("measured (nats per routed token)")
    if not rows.empty:
        legend_above(ax, ncols=2)
