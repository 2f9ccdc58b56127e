"""Experts by experts as an image: scales of color, and numbers of experts that can be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage

from analysis.plots.style import ink
from analysis.stats import SHARED

NOTHING = "#D0D0D0"  # the color of NaN, which neither map has
SEQUENTIAL = mpl.colormaps["viridis"].with_extremes(bad=NOTHING)
DIVERGING = mpl.colormaps["RdBu_r"].with_extremes(bad=NOTHING)
Colors = dict[str, Any]  # norm and cmap of an image
FACTORS = (1.1, 1.25, 1.5, 2, 4, 8, 16, 32, 64)  # where a scale of ratios may end
MOST = 17  # numbers along an axis of a panel


def linear_scale(*tables: Any) -> Colors:
    """From the least to the greatest finite value of all tables."""
    values = _finite(*tables)
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.0 if high - low > 1e-12 * max(abs(low), abs(high)) else 0.5 * (abs(high) or 1.0)
    return dict(norm=Normalize(low - margin, high + margin), cmap=SEQUENTIAL)


def centered_scale(*tables: Any) -> Colors:
    """As far below 0 as above it."""
    reach = np.abs(_finite(*tables)).max(initial=0.0) or 1.0
    return dict(norm=Normalize(-reach, reach), cmap=DIVERGING)


def ratio_scale(center: float, *tables: Any) -> Colors:
    """Log, to the greatest value above the center (at most 64 times) and as far below it.

    Ratios have no least value above 0, so those beyond the end have its color; but half of them
    are within, unless their median is less than a 64th of the center.
    """
    values = _finite(*tables)
    below = center / np.median(values[values > 0]) if (values > 0).any() else 1.0
    reach = max(values.max(initial=0.0) / center, below)
    factor = next((f for f in FACTORS if reach <= f), FACTORS[-1])
    return dict(norm=LogNorm(center / factor, center * factor, clip=True), cmap=DIVERGING)


def draw_matrix(ax: Axes, table: pd.DataFrame, scale: Colors, aspect: str = "equal") -> AxesImage:
    """A cell a value, row by row from the top; NaN is grey."""
    cells = np.ma.masked_invalid(table.to_numpy(dtype=float))
    image = ax.imshow(cells, **scale, interpolation="nearest", aspect=aspect)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=1.5, pad=2, labelsize=6)
    return image


def name_experts(ax: Axes, axis: str, experts: Sequence[int], text: str) -> None:
    """Numbers of experts along "x" or "y", as many as can be read, and always "shared"."""
    routed = [expert for expert in experts if expert != SHARED]
    step = next(2**n for n in range(10) if len(routed) <= MOST * 2**n)
    shared = len(routed) < len(experts)
    places = list(range(0, len(routed) - (step - 1) * shared, step))
    names = [str(routed[place]) for place in places]
    if shared:
        places, names = [*places, len(routed)], [*names, "shared"]
    getattr(ax, f"set_{axis}ticks")(places, names)
    if shared and axis == "x":
        ax.get_xticklabels()[-1].set_rotation(90)
    getattr(ax, f"set_{axis}label")(text)


def draw_panels(
    axes: Sequence[Axes] | np.ndarray,
    tables: Mapping[str, pd.DataFrame],
    scale: Colors,
    x: str,
    y: str,
    text: str,
    title: str = "",
    **place: Any,
) -> None:
    """Experts by experts side by side on one scale, several under their names; x, y and text: of
    the axes and of the bar, whose place is as in `color_bar`; the title says which site it is."""
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        image = draw_matrix(ax, table, scale)
        name_experts(ax, "x", table.columns, x)
        name_experts(ax, "y", table.index, y if ax is axes[0] else "")
        several = [name] * (len(tables) > 1)
        ax.set_title(", ".join([title, *several] if ax is axes[0] and title else several))
    bar = color_bar(image, axes, text, **place)
    if any(_unknown(table) for table in tables.values()):
        bar.ax.set_title("grey: not used", fontsize=6, color=ink(), loc="left")


def _unknown(table: pd.DataFrame) -> bool:
    """Whether more than the diagonal has no value."""
    missing = table.isna().to_numpy(copy=True)
    np.fill_diagonal(missing, False)
    return bool(missing.any())


def color_bar(image: AxesImage, axes: Any, text: str, **place: Any) -> Colorbar:
    """Beside the axes; arrows where values of any of them lie beyond the scale, readable numbers
    on ratios."""
    scale = image.norm
    images = [image for ax in np.ravel(axes) for image in ax.get_images()]
    values = np.concatenate([image.get_array().compressed() for image in images])
    below, above = (values < scale.vmin).any(), (values > scale.vmax).any()
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar = image.figure.colorbar(image, ax=axes, extend=extend, **place)
    if isinstance(scale, LogNorm):
        center, factor = np.sqrt(scale.vmin * scale.vmax), np.sqrt(scale.vmax / scale.vmin)
        powers = round(np.log2(factor)) if factor > 1.9 else 1
        every = 1 if powers <= 3 else 2
        most = powers // every * every
        steps = np.arange(-most, most + 1, every, dtype=float)
        ticks = center * (factor ** (1 / powers)) ** steps
        bar.set_ticks(ticks, labels=[_ratio(tick) for tick in ticks])
        bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=1.5, pad=2)
    bar.set_label(text, fontsize=7)
    return bar


def _ratio(value: float) -> str:
    part = round(1 / value)
    return f"1/{part}" if part > 1 and np.isclose(value * part, 1) else f"{value:.2g}"


def _finite(*tables: Any) -> np.ndarray:
    values = np.concatenate([np.ravel(np.asarray(table, dtype=float)) for table in tables])
    return values[np.isfinite(values)]
