"""What lines and markers are called: names at the ends of lines, legends and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from analysis.plots.style import darker

EARLY = 0.72  # share of the axes' width before which a line has its name at its end
MOST_NAMES = 12  # of lines, in a legend above the axes
NAME_GAP = 7  # points between the axes and names of lines


def label_ends(ax: Axes, drawn: Sequence[Line2D], size: float = 6.5) -> None:
    """Name these lines at their right ends, in their colors, moved apart, and those that end early
    where they do.

    Where there is no room for the names, or nothing would make room for them (axes of a figure
    without a layout engine), all stand in a legend above.
    """
    lines = [line for line in drawn if np.isfinite(line.get_ydata()).any()]
    if not lines:
        return
    figure = ax.get_figure(root=True)
    if engine := figure.get_layout_engine():
        engine.execute(figure)  # how high the axes will be
    room, step = ax.get_window_extent().height * 72 / figure.dpi, 1.15 * size  # points
    if engine is None or step * len(lines) > room:
        (legend_beside if len(lines) > MOST_NAMES else legend_above)(ax, lines)
        return
    points = [np.column_stack(line.get_data()) for line in lines]
    ends = np.array([own[np.isfinite(own).all(axis=1)][-1] for own in points])
    x, y = (ax.transData - ax.transAxes).transform(ends).T  # as shares of the axes
    # In points, so that the room it takes does not change with the width that is left.
    beside = ax.transAxes + ScaledTranslation(NAME_GAP / 72, 0, figure.dpi_scale_trans)
    look: dict[str, Any] = dict(size=size, va="center", annotation_clip=False)
    places = dict(zip(np.flatnonzero(x > EARLY), spread(y[x > EARLY], step / room), strict=True))
    for i, (line, end) in enumerate(zip(lines, ends, strict=True)):
        color, text = line.get_color(), line.get_label()
        look["color"] = darker(color)
        if i in places:
            look["arrowprops"] = dict(arrowstyle="-", lw=0.4, color=color, shrinkA=0, shrinkB=2)
            ax.annotate(text, end, (1, places[i]), textcoords=beside, **look)
        else:
            ax.annotate(text, end, (5, 0), textcoords="offset points", **look)


def spread(wanted: np.ndarray, step: float) -> np.ndarray:
    """The places nearest to those wanted that are a step apart and within 0 to 1."""
    order = np.argsort(wanted, kind="stable")
    stairs = step * np.arange(len(wanted))
    nearest = isotonic_regression(wanted[order] - stairs).x
    places = np.empty(len(wanted))
    places[order] = np.clip(nearest, 0, 1 - stairs.max(initial=0)) + stairs
    return places


def key(label: str, **look: Any) -> Line2D:
    """What a legend has for lines or markers that look like this."""
    return Line2D([], [], label=label, **look)


def legend_beside(ax: Axes, handles: Sequence[Any]) -> None:
    """Of very many lines, in small letters right of the axes, so that these keep their height."""
    columns = -(-len(handles) // (2 * MOST_NAMES))
    how: dict[str, Any] = dict(loc="upper left", bbox_to_anchor=(1, 1), fontsize=5)
    ax.legend(handles=handles, ncols=columns, **how)


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
