"""Rows of estimates with intervals: what the pictures of conditions have in common."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.plots.style import DELTA, widen_scale

GREY = "#404040"
ROW_HEIGHT, FRAME_HEIGHT = 0.32, 0.95  # inches


def figure_height(num_rows: int) -> float:
    """Inches of a figure with so many rows of dots."""
    return FRAME_HEIGHT + ROW_HEIGHT * num_rows


def dot_rows(
    ax: Axes,
    rows: Sequence[tuple[str, str]],
    series: dict[str, tuple[str, bool]],
    cells: dict[tuple[int, str], pd.Series],
) -> None:
    """Draw change of loss sidewards, so that the names of rows need no turning.

    rows     (name, color) from top to bottom
    series   name -> (marker, filled); each has a line of its own within the row
    cells    (row, series) -> delta_nats, low, high; what is missing was not run
    """
    offsets = {name: 0.7 * ((i + 0.5) / len(series) - 0.5) for i, name in enumerate(series)}
    for i, (_, color) in enumerate(rows):
        if i % 2:
            ax.axhspan(i - 0.5, i + 0.5, color="#F2F2F2", lw=0, zorder=0)
        for name, (marker, filled) in series.items():
            if (i, name) not in cells:
                continue
            value, low, high = cells[i, name][["delta_nats", "low", "high"]]
            height = i + offsets[name]
            ax.plot([low, high], [height, height], color=color, lw=1.0)
            face = color if filled else "white"
            ax.plot(value, height, marker, color=color, mfc=face, mew=1.0)
    ax.axvline(0, color=GREY, lw=0.6, zorder=0.5)
    widen_scale(ax.xaxis, [cell.delta_nats for cell in cells.values()])
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(DELTA)
    handles = [
        Line2D([], [], color=GREY, marker=m, ls="", mfc=GREY if filled else "white", label=name)
        for name, (m, filled) in series.items()
    ]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def checkpoint_names(checkpoints: pd.DataFrame) -> list[str]:
    """A model's name, with its train_seed where there are several."""
    several = checkpoints.model.duplicated(keep=False)
    seeds = " #" + checkpoints.train_seed.astype(str)
    return checkpoints.model.where(~several, checkpoints.model + seeds).tolist()
