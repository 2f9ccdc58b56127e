"""Damage of dropping an expert against what it has in common with those that take over: an expert a
marker; how far the two go together, beside chance and the noise of the damage itself."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import baseline, name_rows
from analysis.plots.names import key, legend_above
from analysis.plots.rows import toward_common
from analysis.plots.style import (
    DELTA,
    PAGE_WIDTH,
    canvas,
    check_rows,
    ink,
    marker_look,
    model_styles,
    panels,
)
from analysis.stats import ALL, LOAD, SITE, check_choice

ALL_STYLE = {"marker": "d", "linestyle": "-"}  # in the style's ink
LINE, GAP = 0.08, 0.1  # inches of a model's line, and between metrics
WRAP, LABEL_WRAP = 18, 34  # characters in one line of a metric's name, of the axis' label
NAMES = {"per_mass": "damage per weight dropped", ALL: "all models"}  # others as they are called
COLUMNS = ["r", "low", "high", "null_low", "null_high", "ceiling"]


def relation_dots(table: pd.DataFrame | Any, models: bool = False, ax: Axes | None = None) -> Axes:
    """Rank correlations of damage and overlap over all models, a row a metric.

    table   of `stats.relation`, several of them concatenated, or what `relate` gives. Dots are r
            with its interval, grey bands the null by permutation, ticks at both sides the noise
            ceiling, beyond which no predictor comes
    models  also a line for each model in each row; so it is, too, where the table has no "all"

    Where r is NaN nothing is drawn but the band and the ceiling. Raises `ValueError` for missing
    columns and a table without rows.
    """
    if callable(getattr(table, "table", None)):
        table = table.table()
    check_rows("relation", table, ["metric", "damage", "model", "family", *COLUMNS])
    styles = {ALL: {"color": ink(1)} | ALL_STYLE} | model_styles(table[table.model != ALL])
    if not models and ALL in set(table.model):
        table = table[table.model == ALL]
    lines = sorted(table.model.unique(), key=lambda model: model != ALL)  # stable
    looks = {m: marker_look(styles[m]) | {"ms": 5 if m == ALL else 3} for m in lines}
    several = table.damage.nunique() > 1
    keys = list(dict.fromkeys(zip(table.metric, table.damage, strict=True)))
    names = [
        textwrap.fill(toward_common(metric), WRAP) + f"\n({damage})" * several
        for metric, damage in keys
    ]
    words = max(name.count("\n") for name in names) + 1
    row = max(GAP + LINE * len(lines), 0.14 * words)
    height = 0.9 + 0.13 * (-(-(len(lines) + 2) // 3)) + row * len(keys)
    with canvas(ax, height) as ax:
        for _, found in table.iterrows():
            i, j = keys.index((found.metric, found.damage)), lines.index(found.model)
            y = i + LINE / row * (j - (len(lines) - 1) / 2)
            look, lw = looks[found.model], 1.6 if found.model == ALL else 0.8
            width = found.null_high - found.null_low
            ax.barh(y, width, LINE / row, found.null_low, color=ink(0.15), lw=0, zorder=0.6)
            if found.ceiling > 0:
                ends = [-found.ceiling, found.ceiling]
                ax.plot(ends, [y, y], "|", color=look["color"], ms=4, mew=0.8, zorder=1.5)
            ax.plot([found.low, found.high], [y, y], color=look["color"], lw=lw)
            ax.plot(found.r, y, **look)
        ax.axvline(0, color=ink(), lw=0.6, zorder=0.8)
        for i in range(1, len(keys)):
            ax.axhline(i - 0.5, color=ink(0.1), lw=0.5, zorder=0.4)
        name_rows(ax, names)
        ax.set(xlim=(-1.03, 1.03), xlabel=_label(table))
        handles = [key(NAMES.get(line, line), **look) for line, look in looks.items()]
        ceiling = key("noise ceiling", color=ink(), marker="|", ls="")
        legend_above(ax, [*handles, Patch(fc=ink(0.15), label="null"), ceiling], right=True)
        if "num_sites" in table:
            said = f"intervals over {_range(table.num_sites)} sites"
            ax.text(0, 1, said, transform=ax.transAxes, va="bottom", size=5, color=ink())
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
LARGEST = 40.0  # area of the marker of the most used expert, in square points
COLUMNS_OF_PANELS = 4


def damage_against_overlap(
    experts: pd.DataFrame | Any, metric: str, damage: str = "per_mass", ax: Any = None
) -> Figure:
    """A panel a model on one scale, a marker an expert, its area the load; both numbers less the
    mean of the expert's site, since the relation is one within sites.

    experts  what `analysis.relate` gives, or its table `experts`; metric: a column of it
    damage   "per_mass" (nats per unit of routed weight) or "damage" (nats per token)
    ax       as many axes as there are models; by default a figure two columns wide

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
    styles, most = model_styles(experts), experts.load.max()
    known = experts.dropna(subset=[metric, damage])
    centered = known[[metric, damage]] - known.groupby(SITE)[[metric, damage]].transform("mean")
    known = known.assign(x=centered[metric], y=centered[damage])
    columns = min(COLUMNS_OF_PANELS, len(styles))
    rows = -(-len(styles) // columns)
    shape = (rows, columns) if ax is None else (1, len(styles))
    size = (PAGE_WIDTH, 0.8 + 1.5 * rows)
    with panels(ax, size, *shape, sharex=True, sharey=True) as axes:
        for one, (model, style) in zip(axes, styles.items(), strict=False):
            own, look = known[known.model == model], marker_look(style)
            shown = dict(fc=look["mfc"], ec=look["mec"], lw=look["mew"], alpha=0.8)
            one.scatter(own.x, own.y, LARGEST * own.load / most, marker=look["marker"], **shown)
            one.axhline(0, **baseline())
            one.axvline(0, **baseline())
            one.xaxis.set_major_locator(MaxNLocator(4))
            one.set_title(model)
        for empty in axes[len(styles) :]:
            empty.set_axis_off()
        figure = axes[0].get_figure()
        with_whom = "" if metric == LOAD else " with the experts that take over"
        x = f"{toward_common(metric)}{with_whom}, less the mean of the site"
        y = f"{DAMAGE[damage]}, less\nthe mean of the site"
        circle = dict(ls="", marker="o", mfc="none", mec=ink())
        loads = [
            key(f"load {share * most:.2g}", ms=np.sqrt(LARGEST * share), **circle)
            for share in (0.25, 1.0)
        ]
        if ax is None:
            figure.supxlabel(x, fontsize=8)
            figure.supylabel(y, fontsize=8)
            figure.legend(handles=loads, loc="outside upper right", ncols=2)
        else:
            axes[0].set(xlabel=textwrap.fill(x, LABEL_WRAP), ylabel=y)
    return figure
