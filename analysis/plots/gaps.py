"""The worst flips against as many random ones."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots.dots import GREY
from analysis.plots.style import DELTA, canvas, model_styles, table_of, widen_scale
from analysis.stats.pairs import CHECKPOINT, check_choice

X = {"budget": "flips allowed per token", "flips": "share of chosen experts changed"}
PARTS = {"worst": ("-", True), "random": ("--", False)}


def gap_curve(frame: pd.DataFrame | Any, x: str = "budget", ax: Axes | None = None) -> Axes:
    """Damage of the worst flips (full, solid) and of random ones (open, dashed) over their number.

    frame   the table of `stats.gap`, or a Results; x: "budget", or "flips", what was made of it

    Of flips a token; the space between the lines is the robustness gap. Raises `ValueError` for
    an unknown x and where only flips per sequence were measured.
    """
    frame = table_of(frame, "gap", ["condition", "part", "budget", "delta_nats"])
    check_choice("x", x, [name for name in X if name in frame])
    per_token = ~frame.condition.str.contains("per=sequence")
    if not per_token.any():
        raise ValueError("frame has flips per sequence only; the picture is of flips per token")
    styles, frame = model_styles(frame), frame[per_token]
    with canvas(ax, height=2.5) as ax:
        models = {}
        for (model, *_), rows in frame.groupby(CHECKPOINT, sort=False):
            color, marker = styles[model]["color"], styles[model]["marker"]
            for part, (line, filled) in PARTS.items():
                curve = rows[rows.part == part].sort_values(x)
                face = color if filled else "white"
                ax.plot(curve[x], curve.delta_nats, color=color, marker=marker, mfc=face, ls=line)
                ax.fill_between(curve[x], curve.low, curve.high, color=color, alpha=0.2, lw=0)
            models[model] = Line2D([], [], color=color, marker=marker, label=model)
        widen_scale(ax.yaxis, frame[frame.part != "gap"].delta_nats)
        if x == "budget":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(X[x])
        ax.set_ylabel(DELTA)
        kinds = [
            Line2D([], [], color=GREY, ls=line, marker="o", mfc=GREY if full else "white", label=n)
            for n, (line, full) in PARTS.items()
        ]
        ax.legend(
            handles=[*models.values(), *kinds],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
        )
    return ax
