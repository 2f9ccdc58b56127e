"""How damage goes with each metric of overlap, beside chance and the noise of the damage itself."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.plots.marks import GREY, key, legend_above, name_rows
from analysis.plots.rows import toward_common
from analysis.plots.style import canvas, check_rows, marker_look, model_styles
from analysis.stats import LOAD

ALL, ALL_STYLE = "all", {"color": "black", "marker": "d", "linestyle": "-"}
BAND = "#D9D9D9"
LINE, GAP = 0.08, 0.1  # inches of a model's line, and between metrics
WRAP, LABEL_WRAP = 18, 34  # characters in one line of a metric's name, of the axis' label
DAMAGE = {"per_mass": "damage per weight dropped"}  # others as they are called
COLUMNS = ["r", "low", "high", "null_low", "null_high", "ceiling"]


def relation_dots(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Rank correlations of damage and overlap, a row a metric and in it a line a model.

    table  of `stats.relation`, or several of them concatenated. Dots are r with its interval,
           "all" first and largest; grey bands the null by permutation; ticks at both sides the
           noise ceiling, beyond which no predictor comes

    Where r is NaN nothing is drawn but the band and the ceiling. Raises `ValueError` for missing
    columns and a table without rows.
    """
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
            look = looks[found.model]
            color, lw = look["color"], 1.6 if found.model == ALL else 0.8
            width = found.null_high - found.null_low
            ax.barh(y, width, LINE / row, found.null_low, color=BAND, lw=0, zorder=0.6)
            if found.ceiling > 0:
                ends = [-found.ceiling, found.ceiling]
                ax.plot(ends, [y, y], "|", color=color, ms=4, mew=0.8, zorder=1.5)
            ax.plot([found.low, found.high], [y, y], color=color, lw=lw)
            ax.plot(found.r, y, **look)
        ax.axvline(0, color=GREY, lw=0.6, zorder=0.8)
        for i in range(1, len(keys)):
            ax.axhline(i - 0.5, color="#E5E5E5", lw=0.5, zorder=0.4)
        name_rows(ax, names)
        ax.set_xlim(-1.03, 1.03)
        ax.set_xlabel(_label(table))
        handles = [key(model, **look) for model, look in looks.items()]
        ceiling = key("noise ceiling", color=GREY, marker="|", ls="")
        legend_above(ax, [*handles, Patch(fc=BAND, label="null"), ceiling], right=True)
    return ax


def _label(table: pd.DataFrame) -> str:
    damages, metrics = table.damage.unique(), set(table.metric)
    what = DAMAGE.get(damages[0], damages[0]) if len(damages) == 1 else "damage"
    given = ", given load" * (metrics != {LOAD}) + " (but load itself)" * (metrics > {LOAD})
    return textwrap.fill(f"rank correlation with {what}, within sites{given}", LABEL_WRAP)
