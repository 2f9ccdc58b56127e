"""Damage of dropping an expert against what it has in common with those that take over: an expert a
marker; how far the two go together, beside chance and the noise of the damage itself."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import GREY, change_axis, key, legend_above, name_rows
from analysis.plots.rows import toward_common
from analysis.plots.style import DELTA, canvas, check_rows, marker_look, model_styles
from analysis.stats import ALL, LOAD, SITE, check_choice

ALL_STYLE = {"color": "black", "marker": "d", "linestyle": "-"}
BAND = "#D9D9D9"
LINE, GAP = 0.08, 0.1  # inches of a model's line, and between metrics
WRAP, LABEL_WRAP = 18, 34  # characters in one line of a metric's name, of the axis' label
NAMES = {"per_mass": "damage per weight dropped"}  # others as they are called
COLUMNS = ["r", "low", "high", "null_low", "null_high", "ceiling"]


def relation_dots(table: pd.DataFrame | Any, ax: Axes | None = None) -> Axes:
    """Rank correlations of damage and overlap, a row a metric and in it a line a model.

    table  of `stats.relation`, several of them concatenated, or what `relate` gives. Dots are r
           with its interval, "all" first and largest; grey bands the null by permutation; ticks at
           both sides the noise ceiling, beyond which no predictor comes

    Where r is NaN nothing is drawn but the band and the ceiling. Raises `ValueError` for missing
    columns and a table without rows.
    """
    if callable(getattr(table, "table", None)):
        table = table.table()
    check_rows("relation", table, ["metric", "damage", "model", "family", *COLUMNS])
    models = sorted(table.model.unique(), key=lambda model: model != ALL)  # stable
    styles = {ALL: ALL_STYLE} | model_styles(table[table.model != ALL])
    looks = {m: marker_look(styles[m]) | {"ms": 5 if m == ALL else 3} for m in models}
    several = table.damage.nunique() > 1
    keys = list(dict.fromkeys(zip(table.metric, table.damage, strict=True)))
    names = [
        textwrap.fill(toward_common(metric), WRAP) + f"\n({damage})" * several
        for metric, damage in keys
    ]
    lines = max(name.count("\n") for name in names) + 1
    row = max(GAP + LINE * len(models), 0.14 * lines)
    height = 0.9 + 0.13 * (-(-(len(models) + 2) // 3)) + row * len(keys)
    with canvas(ax, height) as ax:
        for _, found in table.iterrows():
            i, j = keys.index((found.metric, found.damage)), models.index(found.model)
            y = i + LINE / row * (j - (len(models) - 1) / 2)
            look, lw = looks[found.model], 1.6 if found.model == ALL else 0.8
            width = found.null_high - found.null_low
            ax.barh(y, width, LINE / row, found.null_low, color=BAND, lw=0, zorder=0.6)
            if found.ceiling > 0:
                ends = [-found.ceiling, found.ceiling]
                ax.plot(ends, [y, y], "|", color=look["color"], ms=4, mew=0.8, zorder=1.5)
            ax.plot([found.low, found.high], [y, y], color=look["color"], lw=lw)
            ax.plot(found.r, y, **look)
        ax.axvline(0, color=GREY, lw=0.6, zorder=0.8)
        for i in range(1, len(keys)):
            ax.axhline(i - 0.5, color="#E5E5E5", lw=0.5, zorder=0.4)
        name_rows(ax, names)
        ax.set(xlim=(-1.03, 1.03), xlabel=_label(table))
        handles = [key(model, **look) for model, look in looks.items()]
        ceiling = key("noise ceiling", color=GREY, marker="|", ls="")
        legend_above(ax, [*handles, Patch(fc=BAND, label="null"), ceiling], right=True)
        if "num_sites" in table:
            said = f"intervals over {_range(table.num_sites)} sites"
            ax.text(0, 1, said, transform=ax.transAxes, va="bottom", size=5, color=GREY)
    return ax


def _range(numbers: pd.Series) -> str:
    low, high = numbers.min(), numbers.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _label(table: pd.DataFrame) -> str:
    damages, metrics = table.damage.unique(), set(table.metric)
    what = NAMES.get(damages[0], damages[0]) if len(damages) == 1 else "damage"
    given = ", given load" * (metrics != {LOAD}) + " (but load itself)" * (metrics > {LOAD})
    return textwrap.fill(f"rank correlation with {what}, within sites{given}", LABEL_WRAP)


DAMAGE = {"per_mass": "change of loss\n(nats per unit of routed weight)", "damage": DELTA}
LARGEST = 60.0  # area of the marker of the most used expert, in square points


def damage_against_overlap(
    experts: pd.DataFrame | Any, metric: str, damage: str = "per_mass", ax: Axes | None = None
) -> Axes:
    """A marker an expert, its look that of the model and its area the load.

    experts  what `analysis.relate` gives, or its table `experts`; metric: a column of it
    damage   "per_mass" (nats per unit of routed weight) or "damage" (nats per token)

    Distances and divergences are turned round in that table, so that more to the right is always
    more in common. Experts for which either number is NaN are left out. Raises `ValueError` for
    missing columns, a table without rows, and with the choices for an unknown metric or damage.
    """
    experts = getattr(experts, "experts", experts)
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
        with_whom = "" if metric == LOAD else "\nwith the experts that take over"
        ax.set_xlabel(toward_common(metric) + with_whom)
        models = [key(model, ls="", **look) for model, look in looks.items()]
        circle = dict(ls="", marker="o", mfc="none", mec=GREY)
        loads = [
            key(f"load {share * most:.2g}", ms=np.sqrt(LARGEST * share), **circle)
            for share in (0.25, 1.0)
        ]
        legend_above(ax, [*models, *loads])
    return ax
