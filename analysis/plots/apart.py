"""Damage taken apart: with and without the routers behind; divided into set, weights and mass."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.plots.dots import Look, dot_rows, figure_height, groups_of
from analysis.plots.marks import GREY, key, legend_above, name_rows, note_few, offsets
from analysis.plots.style import DELTA, canvas, under

PARTS = {"reroute": Look("o"), "replay": Look("o", False), "cascade": Look("D", False)}


def cascade_dots(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Damage where later routers reroute, where they repeat the clean run, and the difference.

    frame   the table of `stats.cascade`, or a Results; condition: a label, None: all, a row each
    """
    frame, styles = under(condition, frame, "cascade", ["part", "delta_nats"])
    groups = list(groups_of(frame))
    names = {i: (title, styles[model]["color"]) for i, (title, model, _) in enumerate(groups)}
    cells = {(i, row.part): row for i, (*_, rows) in enumerate(groups) for row in rows.itertuples()}
    with canvas(ax, figure_height(len(names))) as ax:
        dot_rows(ax, names, PARTS, cells, columns=3)
    return ax


# Okabe and Ito's colors; hatches for a print in grey. The interaction is a reading of its own.
BARS: dict[str, dict[str, Any]] = {
    "set": dict(fc="#0072B2", ec=GREY, lw=0.5),
    "weights": dict(fc="#E69F00", ec="white", lw=0.5, hatch="////"),
    "mass": dict(fc="#009E73", ec="white", lw=0.5, hatch="...."),
    "interaction": dict(fc="white", ec=GREY, lw=0.5),
}


def split_bars(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Shapley values of set, weights and mass with intervals, beneath them the interaction.

    frame       the table of `stats.split`, or a Results
    condition   a label; None: all, a group of bars each. The line across a group is the damage of
                the whole, which the three add up to; a large interaction says that the division
                depends on its rule.
    """
    frame, _ = under(condition, frame, "split", ["part", "delta_nats"])
    groups = list(groups_of(frame))
    height, shifts = 0.8 / len(BARS), offsets(list(BARS), 0.8)
    with canvas(ax, 0.95 + 0.62 * len(groups)) as ax:
        for i, (_, _, rows) in enumerate(groups):
            parts = rows.set_index("part")
            for part, look in BARS.items():
                row, at = parts.loc[part], i + shifts[part]
                ax.barh(at, row.delta_nats, height, **look)
                ax.plot([row.low, row.high], [at, at], color="black", lw=1.0)
            whole = parts.delta_nats["full"]
            ax.plot([whole, whole], [i - 0.46, i + 0.46], color="black", lw=1.0, ls="--")
        ax.axvline(0, color=GREY, lw=0.6)
        name_rows(ax, [title for title, _, _ in groups])
        note_few(ax, frame, above=True)
        ax.set_xlabel(DELTA)
        handles = [Patch(**look, label=part) for part, look in BARS.items()]
        whole = key("whole", color="black", lw=1.0, ls="--")
        legend_above(ax, [*handles, whole], right=True)
    return ax
