"""A metric of overlap over the depth of each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.marks import (
    GREY,
    change_axis,
    draw_line,
    draw_lines,
    key,
    legend_above,
    offsets,
)
from analysis.plots.rows import metric_rows
from analysis.plots.style import canvas, model_styles, under
from analysis.stats import CHECKPOINT, INDEX, SHARED, facts_of, sites_in


def overlap_profile(overlap: Any, metric: str, ax: Axes | None = None) -> Axes:
    """A metric at each site of each checkpoint, beside its null (dotted).

    overlap  an object with the tables pairs, experts and sites, such as an Overlap, or one of them

    Of pairs or experts it is the mean over them, and the vertical line is their spread: from the
    lower to the upper quartile, no interval. Of a site's own metric the line is its interval over
    documents. A shared expert does not enter, as not all families have one. The second stage of a
    layer stands half a layer behind its first, at a short tick. Raises `ValueError` with the
    choices for an unknown metric and for several steps of training.
    """
    rows = metric_rows(overlap, metric, "pairs", "experts", "sites")
    index = [name for name in INDEX["pairs"] + INDEX["experts"] if name in rows]
    rows = rows[(rows[index] != SHARED).all(axis=1)] if index else rows
    styles = model_styles(rows)
    sites = _sites(rows.assign(x=depth(rows)), many=bool(index))
    sites["x"] += sites.model.map(offsets(list(styles), 0.3))
    with canvas(ax, height=2.5) as ax:
        for (model, *_), line in sites.groupby(CHECKPOINT, sort=False):
            draw_line(ax, line, "x", "value", label=model, bars=True, **styles[model])
            null = dict(color=styles[model]["color"], lw=0.8, ls=":", marker="_", ms=5)
            ax.plot(line.x, line.null, **null)
        depth_axis(ax, rows, "layer")
        ax.set_ylabel(facts_of(metric).label + ("\nmean, quartiles" if index else ""))
        handles = ax.get_legend_handles_labels()[0]
        if rows.null.notna().any():
            handles.append(key("null", color=GREY, lw=0.8, ls=":"))
        # Long handles: a dash must be seen on both sides of a marker.
        legend_above(ax, handles, handlelength=2.8)
    return ax


def _sites(rows: pd.DataFrame, many: bool) -> pd.DataFrame:
    """A row a site: x, value, low, high, null; its own numbers, or mean and quartiles."""
    if not many:
        return rows.sort_values("x")
    by_site = rows.groupby([*CHECKPOINT, "x"], sort=False)
    found = by_site[["value", "null"]].mean()
    found["low"], found["high"] = by_site.value.quantile(0.25), by_site.value.quantile(0.75)
    return found.reset_index().sort_values("x")


WHOLES = ("sum", "joint")


def layer_profile(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Damage at each site alone over the depth; to the right their sum, and all at once.

    frame       the table of `stats.additivity`, or a Results
    condition   the label of the joint condition, by default the first

    The second stage of a layer stands half a layer behind its first, at a short tick. Intervals
    over documents.
    """
    frame, styles = under(condition, frame, "additivity", ["part", "delta_nats"])
    condition = frame.condition.iloc[0]
    frame = frame[(frame.condition == condition) & (frame.part != "joint - sum")]
    sites = sites_in(frame.part)
    last = sites.layer.max()
    step = max(1.0, 0.15 * (last - sites.layer.min()))
    places = {name: last + step * (i + 1.5) for i, name in enumerate(WHOLES)}
    # Shares of a layer, so that a site is nearest to its tick.
    even = np.linspace(-0.15, 0.15, len(styles)) if len(styles) > 1 else [0.0]
    shift = frame.model.map(dict(zip(styles, even, strict=True)))
    alone = frame.assign(x=depth(sites) + shift)
    whole = frame.assign(x=frame.part.map(places) + step * shift)
    with canvas(ax, height=2.5) as ax:
        draw_lines(ax, alone, styles, "x", "delta_nats", bars=True)
        draw_lines(ax, whole, styles, "x", "delta_nats", bars=True, linestyle="")
        ax.axvline(last + 0.9 * step, color="#A0A0A0", lw=0.6, ls=":")
        change_axis(ax.yaxis, frame.delta_nats)
        depth_axis(ax, sites, f"layer at which {condition} acts alone", places)
        legend_above(ax)
    return ax


def depth(rows: pd.DataFrame) -> pd.Series:
    """Where sites stand on an axis of layers: a second stage half a layer behind its first."""
    return rows.layer + rows.stage / (rows.stage.max() + 1)


def depth_axis(
    ax: Axes, rows: pd.DataFrame, label: str, ends: Mapping[str, float] | None = None
) -> None:
    """Tell on the x axis where `depth` puts these sites: a long tick at each layer, with numbers as
    far as there is room, a short one at each later stage, which the label explains.

    ends   names behind the last layer, and where
    """
    layers, ends = sorted(rows.layer.unique()), ends or {}
    step = max(1, round((len(layers) + 2 * len(ends)) / 8))
    numbers = ["" if i % step else str(layer) for i, layer in enumerate(layers)]
    ax.set_xticks([*layers, *ends.values()], [*numbers, *ends])
    later = rows.stage > 0
    if later.any():
        ax.set_xticks(depth(rows)[later].unique(), minor=True)
        stages = sorted(rows.stage[later].unique())
        label += f"\n(short ticks: stage {', '.join(map(str, stages))})"
    ax.set_xlabel(label)
