"""Damage divided into set, weights and mass."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from analysis.plots.dots import GREY, groups_of
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
    height = 0.8 / len(BARS)
    with canvas(ax, 0.95 + 0.62 * len(groups)) as ax:
        for i, (_, _, rows) in enumerate(groups):
            parts = rows.set_index("part")
            for j, (part, (color, hatch)) in enumerate(BARS.items()):
                row, at = parts.loc[part], i + height * (j - (len(BARS) - 1) / 2)
                edge = "white" if hatch else GREY
                ax.barh(at, row.delta_nats, height, color=color, hatch=hatch, ec=edge, lw=0.5)
                ax.plot([row.low, row.high], [at, at], color="black", lw=1.0)
            whole = parts.delta_nats["full"]
            ax.plot([whole, whole], [i - 0.46, i + 0.46], color="black", lw=1.0, ls="--")
        ax.axvline(0, color=GREY, lw=0.6)
        ax.set_yticks(range(len(groups)), [title for title, _, _ in groups])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(groups) - 0.5, -0.5)
        ax.set_xlabel(DELTA)
        handles = [
            Patch(fc=color, hatch=hatch, ec="white" if hatch else GREY, lw=0.5, label=part)
            for part, (color, hatch) in BARS.items()
        ]
        whole = ax.plot([], [], color="black", lw=1.0, ls="--", label="whole")
        ax.legend(handles=[*handles, *whole], loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    return ax
