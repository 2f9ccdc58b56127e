"""What pictures draw alike: lines with intervals, the mean of several training seeds, notes on
both, rows from the top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.style import UNFINISHED, ink, marker_look, tint
from analysis.stats import FEW_DOCUMENTS


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
) -> Line2D:
    """A line through rows of a table and their intervals, if the table has those columns.

    label   stands in the legend once, however often it is drawn
    bars    intervals are a bar at each point, not a band along the line; so they are where points
            stand at one place, and a band would have no width
    """
    if label in ax.get_legend_handles_labels()[1]:
        label = f"_{label}"  # a leading underscore: not in the legend
    (line,) = ax.plot(rows[x], rows[y], label=label, **look)
    low, high = bounds
    if low in rows and (bars or not _apart(rows[x])):
        ax.vlines(rows[x], rows[low], rows[high], color=look["color"], lw=0.8)
    elif low in rows:
        ax.fill_between(rows[x], rows[low], rows[high], color=look["color"], alpha=0.2, lw=0)
    return line


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
) -> list[Line2D]:
    """Draw and return a line a model along x, in its style. Of a model with several training seeds
    it is their mean, where all of them have a point, and each seed a thin line, without a band.

    at    the column by which points of several seeds are the same one, if not x
    how   options of `draw_line`, and what differs from that style
    """
    drawn = []
    for model, own in frame.dropna(subset=[x, y]).groupby("model", sort=False):
        look = styles[model] | how
        if how.get("linestyle") == "":  # then faces tell models of one family apart
            look |= marker_look(styles[model])
        if own.train_seed.nunique() == 1:
            drawn.append(draw_line(ax, own.sort_values(x), x, y, label=model, **look))
            continue
        for _, rows in own.groupby("train_seed"):
            draw_line(ax, rows.sort_values(x), x, y, **look | of_a_seed(look))
        points = own.groupby(own[at or x].to_numpy(), sort=False)
        shared = points.train_seed.nunique() == own.train_seed.nunique()
        means = points[[x, y]].mean()[shared].sort_values(x)
        drawn.append(draw_line(ax, means, x, y, label=model, **look))
    return drawn


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
