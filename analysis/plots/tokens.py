"""Damage by position in the sequence, frequency of the target, or domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.plots.marks import GREY, ZERO, change_axis, draw_lines, legend_above, offsets
from analysis.plots.style import canvas, under
from analysis.stats import check_choice

X = {
    "position": "position in the sequence",
    "frequency": "times that the target occurs in the data",
    "domain": "domain",
}


def group_curve(
    frame: pd.DataFrame | Any,
    by: str = "position",
    condition: str = "DropTop(1)",
    ax: Axes | None = None,
) -> Axes:
    """Damage of groups of tokens with intervals over documents, a line per checkpoint.

    frame   the table of `stats.damage_by`, or a Results; the line breaks between domains, which
            have no order. Raises `ValueError` for an unknown condition.
    """
    columns = ["by", "group", "order", "delta_nats", "low", "high"]
    frame, styles = under(condition, frame, "damage_by", columns, by, [condition])
    by = frame.by.iloc[0]
    groups = frame.drop_duplicates("group").sort_values("order").group.tolist()
    shift = frame.model.map(offsets(list(styles), 0.4))
    frame = frame.assign(x=frame.group.map(groups.index) + shift)
    look = {"linestyle": ""} if by == "domain" else {}
    with canvas(ax, height=2.5) as ax:
        draw_lines(ax, frame, styles, "x", "delta_nats", bars=True, **look)
        change_axis(ax.yaxis, frame.delta_nats)
        turned = sum(map(len, groups)) > 28
        turn = dict(rotation=40, ha="right", rotation_mode="anchor") if turned else {}
        ax.set_xticks(range(len(groups)), groups, **turn)
        ax.set_xlabel(X[by])
        legend_above(ax)
    return ax


TAIL_Y = {"carried": "share of the damage they carry", "rise": "rise of a token's loss (nats)"}


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
    check_choice("y", y, TAIL_Y)
    frame, styles = under(condition, frame, "tail_curve", ["share", *TAIL_Y], [condition])
    with canvas(ax, height=2.4) as ax:
        draw_lines(ax, frame, styles, "share", y, markevery=(0.05, 0.2))
        if y == "carried":
            even = np.geomspace(frame.share.min(), 1, 50)
            ax.plot(even, even, color=GREY, lw=0.8, ls=":", label="evenly spread")
        else:
            ax.axhline(0, **ZERO)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=8))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        ax.set_xlabel(f"worst tokens under {condition}")
        ax.set_ylabel(TAIL_Y[y])
        legend_above(ax)
    return ax
