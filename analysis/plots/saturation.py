"""When the routing of a training run settles."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import GREY, draw_line, key, legend_above
from analysis.plots.style import canvas, check_rows, model_styles
from analysis.stats import SITE

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
    several = len(styles) > 1
    with canvas(ax, height=2.6) as ax:
        for (model, _, _, layer, stage), curve in frame.groupby(SITE, sort=False):
            look, curve = styles[model], curve.sort_values("step")
            color = _paler(look["color"], layers.index(layer), len(layers))
            ax.plot(curve.step, curve.null, color=color, lw=0.7, ls=":")
            own = dict(color=color, marker=look["marker"], ms=3, ls=STAGES[stage % len(STAGES)])
            draw_line(ax, curve, "step", "value", **own)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("training step")
        ax.set_ylabel("agreement with the last step")
        named = styles if several else {}
        base = GREY if several else next(iter(styles.values()))["color"]
        shown = layers if len(layers) <= 4 else [layers[0], layers[len(layers) // 2], layers[-1]]
        keys = [
            key(model, color=look["color"], marker=look["marker"], ms=3)
            for model, look in named.items()
        ]
        keys += [key(f"layer {n}", color=_paler(base, layers.index(n), len(layers))) for n in shown]
        if frame.stage.nunique() > 1:
            keys += [
                key(f"stage {n}", color=GREY, ls=STAGES[n % len(STAGES)])
                for n in sorted(frame.stage.unique())
            ]
        legend_above(ax, [*keys, key("null", color=GREY, ls=":", lw=0.7)], ncols=4)
    return ax


def _paler(color: str, place: int, places: int) -> tuple[float, ...]:
    """Mixed with white, the less the later its place."""
    white = PALEST * (1 - place / max(1, places - 1))
    return tuple(white + (1 - white) * part for part in to_rgb(color))
