"""What dropping an expert costs, against what it has in common with those that take over."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots.dots import GREY
from analysis.plots.sites import label_of
from analysis.plots.style import DELTA, canvas, marker_colors, model_styles, widen_scale
from analysis.stats.pairs import SITE, check_choice, check_columns
from analysis.stats.relation import APART

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
