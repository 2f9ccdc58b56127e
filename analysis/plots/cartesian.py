"""How the two stages of a Cartesian layer are used together, and what composed experts share."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.plots.marks import baseline, name_rows
from analysis.plots.matrices import draw_panels, linear_scale
from analysis.plots.names import legend_above
from analysis.plots.rows import metric_rows, one_site
from analysis.plots.style import PAGE_WIDTH, ground, ink, model_styles, panels
from analysis.stats import square

SHARES = {"composite_a": "A", "composite_b": "B", "composite_interaction": "interaction"}
SIMILAR = {
    "composite_cka_row": "same row ($a_i$)",
    "composite_cka_column": "same column ($b_j$)",
    "composite_cka_unrelated": "neither",
}


def cartesian_usage(
    overlap: Any,
    *,
    layer: int,
    model: str | None = None,
    train_seed: int | None = None,
    ax: Any = None,
) -> Figure:
    """One Cartesian layer, two columns wide: P(B_j | A_i) beside its null; below, what the outputs
    of composed experts are made of, and how alike they are where they share a row or a column.

    overlap  an object with the tables pairs (metric "transition") and sites (the metrics
             "composite_..." of the layer's first stage), such as an Overlap; model and train_seed:
             of one of several
    ax       four axes; by default a new figure

    Shares are of the squares about the mean, with intervals over documents; similarity is mean
    debiased CKA. Diamonds are the nulls: for shares B fed the mean over A's experts, for similarity
    the pairs that share neither. Raises `ValueError` with the choices for a layer without two
    stages or composites, metrics that were not measured, and several checkpoints.
    """
    rows, _ = one_site(metric_rows(overlap, "transition", "pairs"), layer, 1, model, train_seed)
    checkpoint = rows.model.iloc[0], int(rows.train_seed.iloc[0])
    found = {}
    for metric in (*SHARES, *SIMILAR):
        own, title = one_site(metric_rows(overlap, metric, "sites"), layer, 0, *checkpoint)
        found[metric] = own.iloc[0]
    look = model_styles(rows)[checkpoint[0]]
    tables = {"measured": square(rows), "null": square(rows, "null")}
    title = title.partition(", stage")[0]
    with panels(ax, (PAGE_WIDTH, 4.6), 2, 2, height_ratios=(3.0, 1.2)) as axes:
        names = "second stage, $B_j$", "first stage, $A_i$", "$P(B_j\\,|\\,A_i)$"
        draw_panels(axes[:2], tables, linear_scale(*tables.values()), *names, title=title)
        left, right = axes[2:]
        _dots(left, {name: found[m] for m, name in SHARES.items()}, look)
        left.set_xlabel("share of the squares of composed outputs")
        left.set_xlim(min(0.0, left.get_xlim()[0]), max(1.0, left.get_xlim()[1]))
        _dots(right, {name: found[m] for m, name in SIMILAR.items()}, look)
        right.set_xlabel("mean CKA of pairs of composed experts")
    return left.get_figure()


def _dots(ax: Axes, rows: dict[str, pd.Series], look: dict[str, str]) -> None:
    """Values with intervals, from top to bottom, and hollow their nulls."""
    for i, row in enumerate(rows.values()):
        ax.plot([row.low, row.high], [i, i], color=look["color"], lw=1.2)
        ax.plot(row.value, i, look["marker"], color=look["color"], label="_" if i else "measured")
        ax.plot(row.null, i, "d", color=ink(), mfc=ground(), label="_" if i else "null")
    ax.axvline(0, **baseline())
    name_rows(ax, list(rows))
    legend_above(ax, ncols=2, right=True)
