"""What dropping an expert costs, against what it has in common with those that take over."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots.dots import GREY
from analysis.plots.rows import label_of
from analysis.plots.style import DELTA, canvas, marker_colors, model_styles, widen_scale
from analysis.stats import APART, SITE, check_choice, check_columns

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
    check_columns("experts", experts, [*SITE, "expert", "load", damage])
    if experts.empty:
        raise ValueError("table experts has no rows: nothing of it was measured")
    keys = {*SITE, "expert", "mass", *DAMAGE}
    numbers = experts.select_dtypes("number").columns
    bounds = ("_a", "_b", "_low", "_high")
    check_choice("metric", metric, [n for n in numbers if n not in keys and not n.endswith(bounds)])
    looks = {
        model: (style["marker"], *marker_colors(style))
        for model, style in model_styles(experts).items()
    }
    most = experts.load.max()
    with canvas(ax, height=2.8) as ax:
        for model, (marker, face, edge) in looks.items():
            own = experts[experts.model == model].dropna(subset=[metric, damage])
            ax.scatter(
                own[metric], own[damage], s=LARGEST * own.load / most, marker=marker,
                fc=face, ec=edge, alpha=0.75, lw=_edge(edge), label=model,
            )  # fmt: skip
        ax.axhline(0, color=GREY, lw=0.6, zorder=0.5)
        widen_scale(ax.yaxis, experts[damage])
        ax.xaxis.set_major_locator(MaxNLocator(5))
        sign = "\N{MINUS SIGN}" if metric in APART else ""
        with_whom = "" if metric == "load" else "\nwith the experts that take over"
        ax.set_xlabel(sign + label_of(metric) + with_whom)
        ax.set_ylabel(DAMAGE[damage])
        models = [
            Line2D([], [], ls="", marker=marker, mfc=face, mec=edge, mew=_edge(edge), label=model)
            for model, (marker, face, edge) in looks.items()
        ]
        loads = [
            Line2D(
                [], [], ls="", marker="o", mfc="none", mec=GREY, label=f"load {share * most:.2g}",
                ms=np.sqrt(LARGEST * share),
            )
            for share in (0.25, 1.0)
        ]  # fmt: skip
        ax.legend(handles=[*models, *loads], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax


def _edge(color: str) -> float:
    """Width: a white edge parts a marker from others, and must leave something of it."""
    return 0.3 if color == "white" else 0.8


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
