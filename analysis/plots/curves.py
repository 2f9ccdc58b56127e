"""Damage against dose, a line per model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import (
    GREY,
    change_axis,
    draw_line,
    draw_lines,
    face,
    key,
    legend_above,
    note_few,
)
from analysis.plots.style import COLUMN_WIDTH, DELTA, canvas, model_styles, sheet, table_of
from analysis.stats import CHECKPOINT, CONDITION, PLAIN, check_choice

STRENGTH = {
    "DropTop": "top experts disabled per token",
    "DropTop(ratio)": "share of experts disabled per token",
    "DropChosen": "chosen experts disabled per token",
    "DropUnchosen": "unchosen experts disabled per token",
    "GaussianNoise": "noise on the logits (sd)",
    "GumbelNoise": "Gumbel noise (scale)",
    "RandomRouting": "share of tokens routed at random",
    "TopK": "experts used per token",
    "Temperature": "log2 temperature",
}
X = {  # what a dose is called, and where a panel is half a column wide
    "strength": ("strength", "strength"),  # the perturbation says more, in STRENGTH
    "mass_moved": ("routed mass moved per token", "routed mass moved"),
    "flips": ("share of chosen experts changed", "chosen experts changed"),
    "flips_total": ("chosen experts changed, cascade too", "changed, cascade too"),
    "changed": ("share of tokens with another set", "tokens changed"),
    "mass_lost": ("clean routed mass lost per token", "clean mass lost"),
    "active": ("experts used per token", "experts used"),
    "output_change": ("change of the output / residual", "output change / residual"),
}
Y = {  # label, and the columns of the interval
    "delta_nats": (DELTA, "low", "high"),
    "delta_bits_per_byte": ("change of loss (bits per byte)", "bpb_low", "bpb_high"),
    "perplexity_ratio": ("perplexity / clean perplexity", "ratio_low", "ratio_high"),
    "perplexity": ("perplexity", None, None),
    "kl": ("KL from clean (nats per token)", None, None),
    "agreement": ("share of equal top-1 tokens", None, None),
    "delta_max": ("largest rise of a token's loss (nats)", None, None),
}


def damage_curve(
    frame: pd.DataFrame | Any,
    perturbation: str = "GaussianNoise",
    x: str = "strength",
    y: str = "delta_nats",
    where: str = "all",
    point: str = "logits",
    effect: str = PLAIN["effect"],
    downstream: str = PLAIN["downstream"],
    ax: Axes | None = None,
) -> Axes:
    """Damage y against dose x for one perturbation: a line per checkpoint, a band its interval.

    Runs of one model look alike, thinner, and stand in the legend once. The y axis becomes
    symlog where half of the damages would be lost on a linear one. Raises `ValueError` listing
    the choices for an unknown perturbation, x, y, where, point, effect or downstream.
    """
    frame = table_of(frame, "damage", [*CONDITION, "delta_nats"])
    check_choice("x", x, [name for name in X if name in frame])
    check_choice("y", y, [name for name in Y if name in frame])
    wanted = dict(
        perturbation=perturbation, where=where, point=point, effect=effect, downstream=downstream
    )
    styles, rows = model_styles(frame), frame
    for name, value in wanted.items():
        check_choice(name, value, rows[name].unique())
        rows = rows[rows[name] == value]
    text, *bounds = Y[y]
    with canvas(ax, height=2.5) as ax:
        several = rows.groupby("model").train_seed.nunique().max() > 1
        thin: dict[str, Any] = {"lw": 0.7, "ms": 2.5} if several else {}
        draw_lines(ax, rows, styles, x, y, bounds=bounds, **thin)
        change_axis(ax.yaxis, rows[y], text, zero=False)
        if (rows[x].dropna() % 1 == 0).all():
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        strength = STRENGTH.get(perturbation, f"strength of {perturbation}")
        ax.set_xlabel(strength if x == "strength" else X[x][0])
        note_few(ax, rows)
        legend_above(ax)
    return ax


DOSES = ("strength", "mass_moved", "flips", "output_change")


def dose_panels(
    frame: pd.DataFrame | Any,
    perturbation: str = "GaussianNoise",
    doses: Sequence[str] = DOSES,
    **options: Any,
) -> Figure:
    """One perturbation's damage over each dose, two panels a row, on one scale of damage.

    options   those of `damage_curve`; raises `ValueError` like it
    """
    frame = table_of(frame, "damage", ["delta_nats"])
    rows = -(-len(doses) // 2)
    with sheet(COLUMN_WIDTH, 1.6 * rows + 0.4) as figure:
        axes = figure.subplots(rows, 2, sharey=True, squeeze=False).flat
        for ax, dose in zip(axes, doses, strict=False):
            damage_curve(frame, perturbation, x=dose, ax=ax, **options)
            handles = ax.legend_.legend_handles
            ax.legend_.remove()
            ax.set_ylabel("")
            ax.set_xlabel(ax.get_xlabel() if dose == "strength" else X[dose][1], fontsize=7)
        for ax in axes[len(doses) :]:
            ax.set_axis_off()
        figure.supylabel(DELTA, fontsize=8)
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


GAP_X = {"budget": "flips allowed per token", "flips": X["flips"][0]}
GAP_PARTS = {"worst": ("-", True), "random": ("--", False)}


def gap_curve(frame: pd.DataFrame | Any, x: str = "budget", ax: Axes | None = None) -> Axes:
    """Damage of the worst flips (full, solid) and of random ones (open, dashed) over their number.

    frame   the table of `stats.gap`, or a Results; x: "budget", or "flips", what was made of it

    Of flips a token; the space between the lines is the robustness gap. Raises `ValueError` for
    an unknown x and where only flips per sequence were measured.
    """
    frame = table_of(frame, "gap", ["condition", "part", "budget", "per", "delta_nats"])
    check_choice("x", x, [name for name in GAP_X if name in frame])
    per_token = frame.per == "token"
    if not per_token.any():
        raise ValueError("frame has flips per sequence only; the picture is of flips per token")
    styles, frame = model_styles(frame), frame[per_token]
    with canvas(ax, height=2.5) as ax:
        for (model, *_), rows in frame.groupby(CHECKPOINT, sort=False):
            color, marker = styles[model]["color"], styles[model]["marker"]
            for part, (line, filled) in GAP_PARTS.items():
                curve = rows[rows.part == part].sort_values(x)
                look: dict[str, Any] = dict(marker=marker, ls=line, **face(color, filled))
                draw_line(ax, curve, x, "delta_nats", label=model if filled else None, **look)
        change_axis(ax.yaxis, frame[frame.part != "gap"].delta_nats, zero=False)
        if x == "budget":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel(GAP_X[x])
        note_few(ax, frame)
        kinds = [
            key(part, ls=line, marker="o", **face(GREY, filled))
            for part, (line, filled) in GAP_PARTS.items()
        ]
        legend_above(ax, [*ax.get_legend_handles_labels()[0], *kinds])
    return ax
