"""What pictures draw alike: lines with intervals, the mean of several training seeds, names at the
ends of lines, rows from the top, axes of change, legends and their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from analysis.plots.style import DELTA, UNFINISHED, darker, ink, marker_look, tint
from analysis.stats import FEW_DOCUMENTS

EARLY = 0.72  # share of the axes' width before which a line has its name at its end
MOST_NAMES = 12  # of lines, in a legend above the axes
NAME_GAP = 7  # points between the axes and names of lines
ZONE = "#0072B2"  # faint, where a symlog axis is linear


def baseline() -> dict[str, Any]:
    """What a line looks like that changes are read from."""
    return dict(color=ink(), lw=0.6, zorder=0.5)


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
    """Say on the picture that its intervals are over too few documents, where the table tells, and
    that the results it was made from are unfinished; above the axes where rows fill them."""
    number = frame["num_documents"].min() if "num_documents" in frame else FEW_DOCUMENTS
    few = [f"n = {number:.0f}: too few documents"] if number < FEW_DOCUMENTS else []
    if said := ". ".join([*few, *filter(None, [frame.attrs.get(UNFINISHED)])]):
        (x, y), side = ((0.0, 1.0), "left") if above else ((0.99, 0.01), "right")
        look: dict[str, Any] = dict(ha=side, va="bottom", size=5.5, color=ink())
        ax.text(x, y, said, transform=ax.transAxes, **look)


def draw_lines(
    ax: Axes,
    frame: pd.DataFrame,
    styles: Mapping[str, dict[str, Any]],
    x: str,
    y: str,
    at: str | None = None,
    **how: Any,
) -> None:
    """A line a model along x, in its style. Of a model with several training seeds it is their
    mean, where all of them have a point, and each seed a thin line, without a band.

    at    the column by which points of several seeds are the same one, if not x
    how   options of `draw_line`, and what differs from that style
    """
    for model, own in frame.dropna(subset=[x, y]).groupby("model", sort=False):
        look = styles[model] | how
        if how.get("linestyle") == "":  # then faces tell models of one family apart
            look |= marker_look(styles[model])
        if own.train_seed.nunique() == 1:
            draw_line(ax, own.sort_values(x), x, y, label=model, **look)
            continue
        for _, rows in own.groupby("train_seed"):
            draw_line(ax, rows.sort_values(x), x, y, **look | of_a_seed(look))
        points = own.groupby(own[at or x].to_numpy(), sort=False)
        shared = points.train_seed.nunique() == own.train_seed.nunique()
        draw_line(ax, points[[x, y]].mean()[shared].sort_values(x), x, y, label=model, **look)


def of_a_seed(look: Mapping[str, Any]) -> dict[str, Any]:
    """What a single training run of several looks like, behind their mean."""
    thin: dict[str, Any] = {"lw": 0.6, "alpha": 0.45, "zorder": 1.8, "bounds": (None, None)}
    thin |= {"ms": 2} if look.get("linestyle") == "" else {"marker": ""}
    return thin


def note_seeds(ax: Axes, frame: pd.DataFrame) -> None:
    """Say under the picture that single training runs stand behind their mean, where there are
    any."""
    number = frame.groupby("model").train_seed.nunique()
    if (number := number[number > 1]).any():
        several = " to ".join(map(str, dict.fromkeys([number.min(), number.max()])))
        ax.set_xlabel(f"{ax.get_xlabel()}\nmeans of {several} training seeds,\neach of them faint")


def label_ends(ax: Axes, handles: Sequence[Any] = (), size: float = 6.5) -> None:
    """Name lines at their right ends, in their colors, moved apart, and those that end early where
    they do; `handles` go into a legend.

    Where there is no room for the names, or nothing would make room for them (axes of a figure
    without a layout engine), all stand in a legend above.
    """
    named = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    lines = [line for line in named if np.isfinite(line.get_ydata()).any()]
    if not lines:
        return
    figure = ax.get_figure(root=True)
    if engine := figure.get_layout_engine():
        engine.execute(figure)  # how high the axes will be
    room, step = ax.get_window_extent().height * 72 / figure.dpi, 1.15 * size  # points
    if engine is None or step * len(lines) > room:
        many = len(lines) > MOST_NAMES
        beside_or_above = legend_beside if many else legend_above
        beside_or_above(ax, [*lines, *handles])
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
    if handles:
        legend_above(ax, handles)


def spread(wanted: np.ndarray, step: float) -> np.ndarray:
    """The places nearest to those wanted that are a step apart and within 0 to 1."""
    order = np.argsort(wanted, kind="stable")
    stairs = step * np.arange(len(wanted))
    nearest = isotonic_regression(wanted[order] - stairs).x
    places = np.empty(len(wanted))
    places[order] = np.clip(nearest, 0, 1 - stairs.max(initial=0)) + stairs
    return places


def change_axis(axis: Any, values: Iterable[float], label: str = DELTA, zero: bool = True) -> None:
    """An axis of these changes, with a line at 0 that they are read from."""
    if zero:
        zero_line = axis.axes.axvline if axis.axis_name == "x" else axis.axes.axhline
        zero_line(0, **baseline())
    widen_scale(axis, values)
    axis.set_label_text(label)


def widen_scale(axis: Any, values: Iterable[float]) -> None:
    """Make an axis symlog if a linear one would press half of the values into a twentieth.

    Not log: a change of loss may be 0 or negative. The part that stays linear is tinted and named.
    """
    sizes = np.abs(np.asarray(list(values), dtype=float))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    if len(sizes) < 2 or sizes.max() <= 20 * np.median(sizes):
        return
    ax, along_x = axis.axes, axis.axis_name == "x"
    threshold = 10.0 ** np.floor(np.log10(np.median(sizes)))
    getattr(ax, f"set_{axis.axis_name}scale")("symlog", linthresh=threshold)
    ax.autoscale(axis=axis.axis_name)  # else the margins stay those of the linear scale
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    zone, across = (ax.axvspan, "center") if along_x else (ax.axhspan, "right")
    zone(-threshold, threshold, color=tint(ZONE, 0.1), lw=0, zorder=0.1)
    at = (0, 1, ax.get_xaxis_transform()) if along_x else (1, 0, ax.get_yaxis_transform())
    look: dict[str, Any] = dict(size=5.5, color=ink(), ha=across, va="bottom")
    ax.text(*at[:2], "linear", transform=at[2], **look)


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
