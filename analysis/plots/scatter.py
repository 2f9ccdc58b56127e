"""What dropping an expert costs, against what it has in common with those that take over."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import GREY, ZERO, change_axis, draw_line, face, key, legend_above
from analysis.plots.rows import toward_common
from analysis.plots.style import DELTA, canvas, check_rows, marker_look, model_styles
from analysis.stats import SITE, check_choice, check_columns

DAMAGE = {"per_mass": "change of loss\n(nats per unit of routed weight)", "damage": DELTA}
LARGEST = 60.0  # area of the marker of the most used expert, in square points


def damage_against_overlap(
    experts: pd.DataFrame, metric: str, damage: str = "per_mass", ax: Axes | None = None
) -> Axes:
    """A marker an expert, its look that of the model and its area the load.

    experts  the table `experts` of `analysis.relate`; metric: a column of it, damage: "per_mass"
             (nats per unit of routed weight) or "damage" (nats per token)

    Distances and divergences are turned round in that table, so that more to the right is always
    more in common. Experts for which either number is NaN are left out. Raises `ValueError` for
    missing columns, a table without rows, and with the choices for an unknown metric or damage.
    """
    check_choice("damage", damage, DAMAGE)
    check_rows("experts", experts, [*SITE, "expert", "load", damage])
    keys = {*SITE, "expert", "mass", *DAMAGE}
    numbers = experts.select_dtypes("number").columns
    bounds = ("_a", "_b", "_low", "_high")
    check_choice("metric", metric, [n for n in numbers if n not in keys and not n.endswith(bounds)])
    looks = {model: marker_look(style) for model, style in model_styles(experts).items()}
    most = experts.load.max()
    with canvas(ax, height=2.8) as ax:
        for model, look in looks.items():
            own = experts[experts.model == model].dropna(subset=[metric, damage])
            shown = dict(fc=look["mfc"], ec=look["mec"], lw=look["mew"], alpha=0.75, label=model)
            area = LARGEST * own.load / most
            ax.scatter(own[metric], own[damage], area, marker=look["marker"], **shown)
        change_axis(ax.yaxis, experts[damage], DAMAGE[damage])
        ax.xaxis.set_major_locator(MaxNLocator(5))
        with_whom = "" if metric == "load" else "\nwith the experts that take over"
        ax.set_xlabel(toward_common(metric) + with_whom)
        models = [key(model, ls="", **look) for model, look in looks.items()]
        circle = dict(ls="", marker="o", mfc="none", mec=GREY)
        loads = [
            key(f"load {share * most:.2g}", ms=np.sqrt(LARGEST * share), **circle)
            for share in (0.25, 1.0)
        ]
        legend_above(ax, [*models, *loads])
    return ax


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
        ax.axline((0, 0), (1, 1), **ZERO)
        for model, points in rows.groupby("model", sort=False):
            color, marker = styles[model]["color"], styles[model]["marker"]
            for kind, (name, filled) in KINDS.items():
                x, y = f"{kind}_predicted", f"{kind}_measured"
                known = points.dropna(subset=[x, y])
                if known.empty:
                    continue
                text = name if len(styles) == 1 else f"{model}: {name}"
                look = dict(marker=marker, ls="", mew=1.0, clip_on=False, **face(color, filled))
                look["zorder"] = 2.1  # hollow ones hide the bars behind them
                ends = f"{y}_low", f"{y}_high"
                draw_line(ax, known, x, y, ends, label=text, bars=True, **look)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        ax.set_aspect("equal")
        ax.set_xlabel("predicted share of tokens")
        ax.set_ylabel("measured share of tokens")
        legend_above(ax, ncols=2 if len(styles) == 1 else 1)
    return ax
