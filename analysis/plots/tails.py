"""How much of the damage the worst tokens carry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.plots.dots import GREY
from analysis.plots.style import canvas, model_styles, rows_of, table_of
from analysis.stats.pairs import CHECKPOINT, check_choice

Y = {
    "carried": "share of the damage they carry",
    "rise": "rise of a token's loss (nats)",
}


def tail_shares(
    frame: pd.DataFrame | Any,
    condition: str = "DropTop(1)",
    y: str = "carried",
    ax: Axes | None = None,
) -> Axes:
    """Share of the damage carried by the worst tokens, or y "rise": the quantiles themselves.

    frame   the table of `stats.tail_curve`, or a Results with tokens kept

    A share above 1 is no mistake: the other tokens gain. The dotted line is what an even spread
    over tokens would give. Raises `ValueError` for an unknown condition or y.
    """
    check_choice("y", y, Y)
    frame = table_of(frame, "tail_curve", ["condition", "share", *Y], [condition])
    styles = model_styles(frame)
    frame = rows_of(frame, condition)
    with canvas(ax, height=2.4) as ax:
        for (model, *_), rows in frame.groupby(CHECKPOINT, sort=False):
            known = model in ax.get_legend_handles_labels()[1]
            color, line = styles[model]["color"], styles[model]["linestyle"]
            ax.plot(
                rows.share, rows[y], color=color, ls=line, marker=styles[model]["marker"],
                markevery=(0.05, 0.2), label=f"_{model}" if known else model,
            )  # fmt: skip
        if y == "carried":
            even = np.geomspace(frame.share.min(), 1, 50)
            ax.plot(even, even, color=GREY, lw=0.8, ls=":", label="evenly spread")
        else:
            ax.axhline(0, color=GREY, lw=0.6, zorder=0.5)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=8))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        ax.set_xlabel(f"worst tokens under {condition}")
        ax.set_ylabel(Y[y])
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
