"""Rows of estimates with intervals: what the pictures of conditions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.marks import GREY, ZERO, face, key, legend_above, name_rows, offsets
from analysis.plots.style import DELTA, widen_scale
from analysis.stats import CHECKPOINT

ROW_HEIGHT, FRAME_HEIGHT = 0.32, 0.95  # inches


class Look(NamedTuple):
    """Of a series of dots; without a color of its own it has those of the rows."""

    marker: str
    filled: bool = True
    color: str | None = None


def figure_height(num_rows: int, row: float = ROW_HEIGHT) -> float:
    """Inches of a figure with so many rows of dots, each of a height in inches."""
    return FRAME_HEIGHT + row * num_rows


def dot_rows(
    ax: Axes,
    rows: Sequence[tuple[str, str]],
    series: Mapping[str, Look],
    cells: Mapping[tuple[int, str], pd.Series],
    columns: int = 2,
) -> None:
    """Draw change of loss sidewards, so that the names of rows need no turning.

    rows     (name, color) from top to bottom
    series   name -> its look; each has a line of its own within the row
    cells    (row, series) -> delta_nats, low, high; what is missing was not run
    columns  of the legend
    """
    shifts = offsets(list(series), 0.7)
    for i, (_, row_color) in enumerate(rows):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="#F2F2F2", lw=0, zorder=0)
        for name, (marker, filled, own) in series.items():
            if (i, name) not in cells:
                continue
            color = own or row_color
            value, low, high = cells[i, name][["delta_nats", "low", "high"]]
            height = i + shifts[name]
            ax.plot([low, high], [height, height], color=color, lw=1.0)
            ax.plot(value, height, marker, **face(color, filled), mew=1.0)
    ax.axvline(0, **ZERO)
    widen_scale(ax.xaxis, [cell.delta_nats for cell in cells.values()])
    name_rows(ax, [name for name, _ in rows])
    ax.set_xlabel(DELTA)
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


def checkpoint_names(checkpoints: pd.DataFrame) -> list[str]:
    """A model's name, with its train_seed where there are several."""
    several = checkpoints.model.duplicated(keep=False)
    seeds = " #" + checkpoints.train_seed.astype(str)
    return checkpoints.model.where(~several, checkpoints.model + seeds).tolist()
