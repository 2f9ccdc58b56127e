"""Flips of routing that margins predict, against those that noise made."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import GREY
from analysis.plots.style import canvas, model_styles
from analysis.stats.pairs import check_columns

# Name in the legend, whether the marker is filled.
KINDS = {"changed": ("any change of the set", True), "pair": ("pair at the border", False)}


def flip_calibration(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Measured against predicted share of tokens, from `analysis.flip_prediction`.

    A point a site and sigma, with its interval over documents; on the line they agree. Filled: any
    change of the set of experts; hollow: the pair at its border, where that is defined. The row of
    all sites is drawn only where there is no other. Raises `ValueError` naming missing columns.
    """
    numbers = [f"{kind}_{what}" for kind in KINDS for what in ("predicted", "measured")]
    bounds = [f"{kind}_measured_{bound}" for kind in KINDS for bound in ("low", "high")]
    check_columns("flips", frame, ["model", "family", "where", *numbers, *bounds])
    sites = frame[frame["where"] != "all"]
    rows = frame if sites.empty else sites
    styles = model_styles(frame)
    with canvas(ax, height=3.1) as ax:
        ax.axline((0, 0), (1, 1), color=GREY, lw=0.6, zorder=0.5)
        for model, points in rows.groupby("model", sort=False):
            color, marker = styles[model]["color"], styles[model]["marker"]
            for kind, (name, filled) in KINDS.items():
                known = points.dropna(subset=[f"{kind}_predicted", f"{kind}_measured"])
                if known.empty:
                    continue
                x, y = known[f"{kind}_predicted"], known[f"{kind}_measured"]
                ax.vlines(
                    x,
                    known[f"{kind}_measured_low"],
                    known[f"{kind}_measured_high"],
                    color=color,
                    lw=0.8,
                )
                text = name if len(styles) == 1 else f"{model}: {name}"
                face = color if filled else "white"
                ax.plot(
                    x, y, marker, ls="", color=color, mfc=face, mew=1.0, label=text, clip_on=False
                )
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")
        ax.set_xlabel("predicted share of tokens")
        ax.set_ylabel("measured share of tokens")
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(styles) == 1 else 1)
    return ax
