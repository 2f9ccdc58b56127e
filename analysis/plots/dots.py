"""Rows of estimates with intervals: what the pictures of conditions have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.marks import GREY, change_axis, face, key, legend_above, name_rows, offsets
from analysis.stats import CHECKPOINT

ROW_HEIGHT, FRAME_HEIGHT = 0.32, 0.95  # inches


class Look(NamedTuple):
    """Of a series of dots; without a color of its own it has those of the rows."""

    marker: str
    filled: float = 1.0
    color: str | None = None


def figure_height(num_rows: int, row: float = ROW_HEIGHT) -> float:
    """Inches of a figure with so many rows of dots, each of a height in inches."""
    return FRAME_HEIGHT + row * num_rows


def dot_rows(
    ax: Axes,
    rows: Mapping[Any, tuple[str, str]],
    series: Mapping[str, Look],
    cells: Mapping[tuple[Any, str], Any],
    columns: int = 2,
) -> None:
    """Draw change of loss sidewards, so that the names of rows need no turning.

    rows     row -> (name, color), from top to bottom
    series   name -> its look; each has a line of its own within the row
    cells    (row, series) -> a tuple with delta_nats, low, high; what is missing was not run
    columns  of the legend
    """
    shifts = offsets(list(series), 0.7)
    for i, (row, (_, row_color)) in enumerate(rows.items()):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="#F2F2F2", lw=0, zorder=0)
        for name, (marker, filled, own) in series.items():
            if cell := cells.get((row, name)):
                color, height = own or row_color, i + shifts[name]
                ax.plot([cell.low, cell.high], [height, height], color=color, lw=1.0)
                ax.plot(cell.delta_nats, height, marker, **face(color, filled), mew=1.0)
    change_axis(ax.xaxis, [cell.delta_nats for cell in cells.values()])
    name_rows(ax, [name for name, _ in rows.values()])
    keys = [
        key(name, marker=marker, ls="", **face(own or GREY, filled))
        for name, (marker, filled, own) in series.items()
    ]
    legend_above(ax, keys, columns, right=True)


def groups_of(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(title, model, rows) of each checkpoint and condition of a table of parts: a model's name,
    and its train_seed and the condition where there are several."""
    seeds = frame.groupby("model").train_seed.nunique().max() > 1
    conditions = frame.condition.nunique() > 1
    for (model, _, seed, name), rows in frame.groupby([*CHECKPOINT, "condition"], sort=False):
        title = f"{model} #{seed}" if seeds else model
        yield f"{title}\n{name}" if conditions else title, model, rows


def checkpoint_names(keys: Iterable[tuple[str, str, int]]) -> dict[tuple[str, str, int], str]:
    """Names of checkpoints: that of the model, with its train_seed where it has several."""
    checkpoints = dict.fromkeys(keys)
    seeds = Counter(model for model, _, _ in checkpoints)
    return {(m, f, s): f"{m} #{s}" if seeds[m] > 1 else m for m, f, s in checkpoints}
