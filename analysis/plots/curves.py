"""Damage against dose, a line per model."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from analysis.plots.style import DELTA, canvas, damage_frame, model_styles, widen_scale
from analysis.stats.pairs import CHECKPOINT, CONDITION, PLAIN, check_choice

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
X = {
    "strength": "strength",
    "mass_moved": "routed mass moved per token",
    "flips": "share of chosen experts changed",
    "flips_total": "chosen experts changed, cascade too",
    "changed": "share of tokens with another set",
    "mass_lost": "clean routed mass lost per token",
    "active": "experts used per token",
    "output_change": "change of the output / residual",
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
    frame = damage_frame(frame, [*CONDITION, "delta_nats"])
    check_choice("x", x, [name for name in X if name in frame])
    check_choice("y", y, [name for name in Y if name in frame])
    wanted = dict(
        perturbation=perturbation, where=where, point=point, effect=effect, downstream=downstream
    )
    styles = model_styles(frame)
    rows = frame
    for name, value in wanted.items():
        check_choice(name, value, rows[name].unique())
        rows = rows[rows[name] == value]
    text, low, high = Y[y]
    with canvas(ax, height=2.5) as ax:
        drawn = set()
        several = rows.groupby("model").train_seed.nunique().max() > 1
        thin = {"lw": 0.7, "ms": 2.5} if several else {}
        for (model, _, _), curve in rows.groupby(CHECKPOINT, sort=False):
            curve = curve.dropna(subset=[x, y]).sort_values(x)
            name = "_" if model in drawn else model  # a leading underscore: not in the legend
            ax.plot(curve[x], curve[y], label=name, **styles[model], **thin)
            if low in frame:
                color = styles[model]["color"]
                ax.fill_between(curve[x], curve[low], curve[high], color=color, alpha=0.2, lw=0)
            drawn.add(model)
        widen_scale(ax.yaxis, rows[y])
        if (rows[x].dropna() % 1 == 0).all():
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        default = f"strength of {perturbation}"
        ax.set_xlabel(STRENGTH.get(perturbation, default) if x == "strength" else X[x])
        ax.set_ylabel(text)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return ax
