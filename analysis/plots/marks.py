"""What pictures draw alike: lines with intervals, rows from the top, legends and their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.style import DELTA, tint, widen_scale
from analysis.stats import CHECKPOINT, FEW_DOCUMENTS

GREY = "#404040"
ZERO: dict[str, Any] = dict(color=GREY, lw=0.6, zorder=0.5)  # the line that changes are read from


def draw_line(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    bounds: Sequence[str | None] = ("low", "high"),
    *,
    label: str | None = None,
    bars: bool = False,
    **look: Any,
) -> None:
    """A line through rows of a table and their intervals, if the table has those columns.

    label   stands in the legend once, however often it is drawn
    bars    intervals are a bar at each point, not a band along the line; so they are where points
            stand at one place, and a band would have no width
    """
    if label in ax.get_legend_handles_labels()[1]:
        label = f"_{label}"  # a leading underscore: not in the legend
    ax.plot(rows[x], rows[y], label=label, **look)
    low, high = bounds
    if low in rows and (bars or not _apart(rows[x])):
        ax.vlines(rows[x], rows[low], rows[high], color=look["color"], lw=0.8)
    elif low in rows:
        ax.fill_between(rows[x], rows[low], rows[high], color=look["color"], alpha=0.2, lw=0)


def _apart(values: pd.Series) -> bool:
    """Whether a band along these has some width between all of them."""
    steps = np.diff(np.sort(values.dropna()))
    return len(steps) > 0 and bool((steps > 1e-3 * np.abs(values).max()).all())


def note_few(ax: Axes, frame: pd.DataFrame, above: bool = False) -> None:
    """Say on the picture that its intervals are over too few documents, where the table tells;
    above the axes where rows fill them."""
    number = frame["num_documents"].min() if "num_documents" in frame else FEW_DOCUMENTS
    if number < FEW_DOCUMENTS:
        (x, y), side = ((0.0, 1.0), "left") if above else ((0.99, 0.01), "right")
        look: dict[str, Any] = dict(ha=side, va="bottom", size=5, color=GREY)
        ax.text(x, y, f"n = {number:.0f}: too few documents", transform=ax.transAxes, **look)


def draw_lines(
    ax: Axes, frame: pd.DataFrame, styles: Mapping[str, dict[str, Any]], x: str, y: str, **how: Any
) -> None:
    """A line a checkpoint along x, in the style of its model, which the legend names once.

    how   options of `draw_line`, and what differs from that style
    """
    for (model, *_), rows in frame.groupby(CHECKPOINT, sort=False):
        rows = rows.dropna(subset=[x, y]).sort_values(x)
        draw_line(ax, rows, x, y, label=model, **styles[model] | how)


def change_axis(axis: Any, values: Iterable[float], label: str = DELTA, zero: bool = True) -> None:
    """An axis of these changes, with a line at 0 that they are read from."""
    if zero:
        zero_line = axis.axes.axvline if axis.axis_name == "x" else axis.axes.axhline
        zero_line(0, **ZERO)
    widen_scale(axis, values)
    axis.set_label_text(label)


def face(color: str, filled: float) -> dict[str, str]:
    """Colors of a marker, of whose face so much is filled: hollow with 0, a tint below 1."""
    return {"color": color, "mfc": tint(color, filled)}


def offsets(names: Sequence[str], room: float) -> dict[str, float]:
    """Where in so much room each of several lines stands, evenly spread around 0."""
    return {name: room * ((i + 0.5) / len(names) - 0.5) for i, name in enumerate(names)}


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Rows 0, 1, ... of the y axis, from the top."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(names) - 0.5, -0.5)


def key(label: str, **look: Any) -> Line2D:
    """What a legend has for lines or markers that look like this."""
    return Line2D([], [], label=label, **look)


def legend_above(
    ax: Axes,
    handles: Sequence[Any] | None = None,
    ncols: int = 3,
    *,
    right: bool = False,
    **how: Any,
) -> None:
    """Over the middle of the axes, or over their right end; without handles of all labels."""
    loc, x = ("lower right", 1.0) if right else ("lower center", 0.5)
    ax.legend(handles=handles, loc=loc, bbox_to_anchor=(x, 1.0), ncols=ncols, **how)
