"""Axes of changes of loss, which may be 0 or negative, and much larger for some than for others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from analysis.plots.marks import baseline
from analysis.plots.style import DELTA, ink, tint

ZONE = "#0072B2"  # faint, where a symlog axis is linear


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
