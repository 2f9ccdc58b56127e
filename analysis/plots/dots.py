"""Rows of estimates with intervals: what the pictures of conditions have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.marks import face, name_rows, offsets
from analysis.plots.names import key, legend_above
from analysis.plots.scales import change_axis
from analysis.plots.style import ink

ROW_HEIGHT, FRAME_HEIGHT, LEAST_HEIGHT = 0.26, 1.15, 0.5  # inches

# (row, series) -> an estimate a training seed: tuples with delta_nats, low, high.
Cells = Mapping[tuple[Any, str], Sequence[Any]]


class Look(NamedTuple):
    """Of a series of dots; without a color of its own it has those of the rows."""

    marker: str
    filled: float = 1.0
    color: str | None = None


def figure_height(num_rows: int, row: float = ROW_HEIGHT) -> float:
    """Inches of a figure with so many rows of dots, each of a height in inches."""
    return FRAME_HEIGHT + max(row * num_rows, LEAST_HEIGHT)


def cells_of(found: Iterable[tuple[tuple[Any, str], Any]]) -> Cells:
    """Those of one row and series, of several training seeds, together."""
    cells = defaultdict(list)
    for place, cell in found:
        cells[place].append(cell)
    return cells


def dot_rows(
    ax: Axes,
    rows: Mapping[Any, tuple[str, str]],
    series: Mapping[str, Look],
    cells: Cells,
    columns: int = 2,
) -> None:
    """Draw change of loss sidewards, so that the names of rows need no turning.

    rows     row -> (name, color), from top to bottom; one that has no cells is a heading
    series   name -> its look; each has a line of its own within the row
    cells    what is missing was not run; of several training seeds a small dot each, with its
             interval, and the mean as large as a single one would be, where all were run
    columns  of the legend; 0: none
    """
    shifts = offsets(list(series), 0.7)
    seeds = {row: max(len(own) for (r, _), own in cells.items() if r == row) for row, _ in cells}
    for i, (row, (_, row_color)) in enumerate(rows.items()):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color=ink(0.045), lw=0, zorder=0)
        for name, (marker, filled, own) in series.items():
            if found := cells.get((row, name)):
                color, height = own or row_color, i + shifts[name]
                faint = {"alpha": 0.4} if seeds[row] > 1 else {}
                for cell in found:
                    ax.plot([cell.low, cell.high], [height] * 2, color=color, lw=1.0, **faint)
                    if faint:
                        ax.plot(cell.delta_nats, height, ".", color=color, ms=3, mew=0, **faint)
                if len(found) == seeds[row]:
                    mean = np.mean([cell.delta_nats for cell in found])
                    ax.plot(mean, height, marker, **face(color, filled), mew=1.0)
    change_axis(ax.xaxis, [cell.delta_nats for found in cells.values() for cell in found])
    name_rows(ax, [name for name, _ in rows.values()])
    for row, text in zip(rows, ax.get_yticklabels(), strict=True):
        text.set_fontweight("normal" if row in seeds else "bold")
    keys = [
        key(name, marker=marker, ls="", **face(own or ink(), filled))
        for name, (marker, filled, own) in series.items()
    ]
    if columns:
        legend_above(ax, keys, columns, right=True)


def sections_of(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(title, model, rows of all seeds) of each model in a table of parts; where there are several
    conditions, by condition, each under a heading: (title, "", no rows)."""
    several = frame.condition.nunique() > 1
    for condition, own in frame.groupby("condition", sort=False):
        if several:
            yield condition, "", own[:0]
        for model, rows in own.groupby("model", sort=False):
            yield model, model, rows
