"""Routing by itself: when it settles in training, and how often margins foretell that it flips."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import baseline, draw_line, face
from analysis.plots.names import key, legend_above
from analysis.plots.style import canvas, check_rows, ink, model_styles
from analysis.stats import SITE, check_columns

STAGES = ["-", "--", "-.", ":"]
PALEST = 0.55  # share of white in the color of the first layer


def saturation_curve(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Agreement of routing with that of the last checkpoint over training, a line a site.

    frame  the table of `analysis.saturation`, or those of several runs concatenated

    The color and marker are the family's, paler for lower layers; second stages are dashed. Bands
    are intervals over documents, thin dotted lines the null: agreement by load alone. Raises
    `ValueError` for missing columns and a table without rows.
    """
    check_rows("saturation", frame, [*SITE, "step", "value", "low", "high", "null"])
    styles, layers = model_styles(frame), sorted(frame.layer.unique())
    with canvas(ax, height=2.6) as ax:
        for (model, _, _, layer, stage), curve in frame.groupby(SITE, sort=False):
            look, curve = styles[model], curve.sort_values("step")
            color = _paler(look["color"], layers.index(layer), len(layers))
            ax.plot(curve.step, curve.null, color=color, lw=0.7, ls=":")
            own = dict(color=color, marker=look["marker"], ms=3, ls=STAGES[stage % len(STAGES)])
            draw_line(ax, curve, "step", "value", **own)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set(xlabel="training step", ylabel="agreement with the last step", ylim=(0, 1.03))
        named = styles if len(styles) > 1 else {}
        base = ink() if named else next(iter(styles.values()))["color"]
        shown = layers if len(layers) <= 4 else [layers[0], layers[len(layers) // 2], layers[-1]]
        keys = [
            key(model, color=look["color"], marker=look["marker"], ms=3)
            for model, look in named.items()
        ]
        keys += [key(f"layer {n}", color=_paler(base, layers.index(n), len(layers))) for n in shown]
        stages = sorted(frame.stage.unique())
        if len(stages) > 1:
            keys += [key(f"stage {n}", color=ink(), ls=STAGES[n % len(STAGES)]) for n in stages]
        legend_above(ax, [*keys, key("null", color=ink(), ls=":", lw=0.7)], ncols=4)
    return ax


def _paler(color: str, place: int, places: int) -> tuple[float, ...]:
    """Mixed with white, the less the later its place."""
    white = PALEST * (1 - place / max(1, places - 1))
    return tuple(white + (1 - white) * part for part in to_rgb(color))


# Name in the legend, whether the marker is filled.
KINDS = {"changed": ("any change of the set", True), "pair": ("pair at the border", False)}


def flip_calibration(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Measured against predicted share of tokens, from `analysis.flip_prediction`.

    A point a site and sigma, with its interval over documents; on the line they agree. Filled: any
    change of the set of experts; hollow: the pair at its border, where that is defined. The row of
    all sites is drawn only where there is no other. Raises `ValueError` naming missing columns.
    """
    numbers = [f"{kind}_{what}" for kind in KINDS for what in ("predicted", "measured")]
    bounds = [f"{kind}_measured_{bound}" for kind in KINDS for bound in ("low", "high")]
    check_columns("flips", frame, ["model", "family", "where", *numbers, *bounds])
    sites = frame[frame["where"] != "all"]
    rows = frame if sites.empty else sites
    styles = model_styles(frame)
    with canvas(ax, height=3.1) as ax:
        ax.axline((0, 0), (1, 1), **baseline())
        for model, points in rows.groupby("model", sort=False):
            color, marker = styles[model]["color"], styles[model]["marker"]
            for kind, (name, filled) in KINDS.items():
                x, y = f"{kind}_predicted", f"{kind}_measured"
                known = points.dropna(subset=[x, y])
                if known.empty:
                    continue
                text = name if len(styles) == 1 else f"{model}: {name}"
                look = dict(marker=marker, ls="", mew=1.0, clip_on=False, **face(color, filled))
                look["zorder"] = 2.1  # hollow ones hide the bars behind them
                ends = f"{y}_low", f"{y}_high"
                draw_line(ax, known, x, y, ends, label=text, bars=True, **look)
        ax.set(xlabel="predicted share of tokens", ylabel="measured share of tokens")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        legend_above(ax, ncols=2 if len(styles) == 1 else 1)
    return ax
