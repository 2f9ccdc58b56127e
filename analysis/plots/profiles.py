"""A metric of overlap over the depth of each model."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.dots import GREY
from analysis.plots.sites import depth, depth_axis, label_of, metric_rows
from analysis.plots.style import canvas, model_styles
from analysis.stats.experts import INDEX, SHARED
from analysis.stats.pairs import CHECKPOINT

TABLES = ("pairs", "experts", "sites")


def overlap_profile(overlap: Any, metric: str, ax: Axes | None = None) -> Axes:
    """A metric at each site of each checkpoint, beside its null (dotted).

    overlap  an object with the tables pairs, experts and sites, such as an Overlap, or one of them

    Of pairs or experts it is the mean over them, and the vertical line is their spread: from the
    lower to the upper quartile, no interval. Of a site's own metric the line is its interval over
    documents. A shared expert does not enter, as not all families have one. The second stage of a
    layer stands half a layer behind its first, at a short tick. Raises `ValueError` with the
    choices for an unknown metric and for several steps of training.
    """
    rows = metric_rows(overlap, metric, *TABLES)
    index = [name for name in INDEX["pairs"] + INDEX["experts"] if name in rows]
    rows = rows[(rows[index] != SHARED).all(axis=1)] if index else rows
    styles = model_styles(rows)
    sites = _sites(rows.assign(x=depth(rows)), many=bool(index))
    models, seen = list(styles), set()
    with canvas(ax, height=2.5) as ax:
        for (model, *_), line in sites.groupby(CHECKPOINT, sort=False):
            look = styles[model]
            shift = 0.3 * ((models.index(model) + 0.5) / len(models) - 0.5)
            x = line.x + shift
            ax.plot(x, line["value"], label=f"_{model}" if model in seen else model, **look)
            ax.vlines(x, line.low, line.high, color=look["color"], lw=0.8)
            ax.plot(x, line.null, color=look["color"], lw=0.8, ls=":", marker="_", ms=5)
            seen.add(model)
        depth_axis(ax, rows, "layer")
        ax.set_ylabel(label_of(metric) + ("\nmean, quartiles" if index else ""))
        handles = ax.get_legend_handles_labels()[0]
        if rows.null.notna().any():
            handles.append(Line2D([], [], color=GREY, lw=0.8, ls=":", label="null"))
        # Long handles: a dash must be seen on both sides of a marker.
        ax.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            handlelength=2.8,
        )
    return ax


def _sites(rows: pd.DataFrame, many: bool) -> pd.DataFrame:
    """A row a site: x, value, low, high, null; its own numbers, or mean and quartiles."""
    if not many:
        return rows.sort_values("x")
    by_site = rows.groupby([*CHECKPOINT, "x"], sort=False)
    found = by_site[["value", "null"]].mean()
    found["low"], found["high"] = by_site.value.quantile(0.25), by_site.value.quantile(0.75)
    return found.reset_index().sort_values("x")
