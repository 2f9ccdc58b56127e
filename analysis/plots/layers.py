"""Where in the depth of a model damage is done, and whether it adds up."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import GREY
from analysis.plots.sites import depth, depth_axis
from analysis.plots.style import DELTA, canvas, model_styles, rows_of, table_of, widen_scale
from analysis.stats.pairs import CHECKPOINT, check_choice

PART, WHOLES = r"layer (?P<layer>\d+) stage (?P<stage>\d+)", ("sum", "joint")


def layer_profile(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Damage at each site alone over the depth; to the right their sum, and all at once.

    frame       the table of `stats.additivity`, or a Results
    condition   the label of the joint condition, by default the first

    The second stage of a layer stands half a layer behind its first, at a short tick. Intervals
    over documents.
    """
    frame = table_of(frame, "additivity", ["condition", "part", "delta_nats"])
    styles = model_styles(frame)
    condition = frame.condition.iloc[0] if condition is None else condition
    check_choice("condition", condition, frame.condition.unique())
    frame = rows_of(frame, condition)
    frame = frame[frame.part != "joint - sum"]
    sites = frame.part.str.extract(PART).dropna().astype(int)
    frame = frame.assign(x=depth(sites))
    last = sites.layer.max()
    step = max(1.0, 0.15 * (last - sites.layer.min()))
    places = {name: last + step * (i + 1.5) for i, name in enumerate(WHOLES)}
    models = list(styles)
    with canvas(ax, height=2.5) as ax:
        for (model, _, _), rows in frame.groupby(CHECKPOINT, sort=False):
            look, shift = styles[model], 0.0  # of a layer, so that a site is nearest to its tick
            if len(models) > 1:
                shift = 0.3 * (models.index(model) / (len(models) - 1) - 0.5)
            own = f"_{model}" if model in ax.get_legend_handles_labels()[1] else model
            alone = rows[rows.x.notna()].sort_values("x")
            ax.plot(alone.x + shift, alone.delta_nats, label=own, **look)
            ends = rows[rows.x.isna()]
            x_ends = ends.part.map(places) + step * shift
            ax.plot(x_ends, ends.delta_nats, color=look["color"], marker=look["marker"], ls="")
            for x, part in ((alone.x + shift, alone), (x_ends, ends)):
                ax.vlines(x, part.low, part.high, color=look["color"], lw=0.8)
        ax.axhline(0, color=GREY, lw=0.6, zorder=0.5)
        ax.axvline(last + 0.9 * step, color="#A0A0A0", lw=0.6, ls=":")
        widen_scale(ax.yaxis, frame.delta_nats)
        depth_axis(ax, sites, f"layer at which {condition} acts alone", places)
        ax.set_ylabel(DELTA)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
