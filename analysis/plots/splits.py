"""Damage divided into set, weights and mass."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.plots.dots import groups_of
from analysis.plots.marks import GREY, key, legend_above, name_rows, offsets
from analysis.plots.style import DELTA, canvas, rows_of, table_of

# Okabe and Ito's colors; hatches for a print in grey. The interaction is a reading of its own.
BARS = {
    "set": ("#0072B2", ""),
    "weights": ("#E69F00", "////"),
    "mass": ("#009E73", "...."),
    "interaction": ("white", ""),
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
    frame = rows_of(table_of(frame, "split", ["condition", "part", "delta_nats"]), condition)
    groups = list(groups_of(frame))
    height, shifts = 0.8 / len(BARS), offsets(list(BARS), 0.8)
    with canvas(ax, 0.95 + 0.62 * len(groups)) as ax:
        for i, (_, _, rows) in enumerate(groups):
            parts = rows.set_index("part")
            for part, (color, hatch) in BARS.items():
                row, at = parts.loc[part], i + shifts[part]
                edge = "white" if hatch else GREY
                ax.barh(at, row.delta_nats, height, color=color, hatch=hatch, ec=edge, lw=0.5)
                ax.plot([row.low, row.high], [at, at], color="black", lw=1.0)
            whole = parts.delta_nats["full"]
            ax.plot([whole, whole], [i - 0.46, i + 0.46], color="black", lw=1.0, ls="--")
        ax.axvline(0, color=GREY, lw=0.6)
        name_rows(ax, [title for title, _, _ in groups])
        ax.set_xlabel(DELTA)
        handles = [
            Patch(fc=color, hatch=hatch, ec="white" if hatch else GREY, lw=0.5, label=part)
            for part, (color, hatch) in BARS.items()
        ]
        whole = key("whole", color="black", lw=1.0, ls="--")
        legend_above(ax, [*handles, whole], right=True)
    return ax
