"""Damage against dose, a line a model; the worst flips beside random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.plots.marks import draw_lines, note_few, note_seeds
from analysis.plots.names import label_ends
from analysis.plots.scales import change_axis
from analysis.plots.style import DELTA, PAGE_WIDTH, canvas, model_styles, panels, table_of
from analysis.stats import CONDITION, PLAIN, check_choice

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
    "strength": "strength",  # the perturbation says more, in STRENGTH
    "mass_moved": "routed mass moved per token",
    "flips": "share of chosen experts changed",
    "flips_total": "share of chosen experts changed, cascade too",
    "changed": "share of tokens with another set",
    "mass_lost": "clean routed mass lost per token",
    "active": "experts used per token",
    "output_change": "norm of the output's change / of the residual stream",
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


EXPLODED = 30.0  # a perplexity so many times the smallest one asks for a log axis


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
    """Damage y against dose x for one perturbation: a line a model, a band its interval over
    documents. Of several training seeds it is their mean, and each a thin line without a band.

    The y axis becomes log where perplexities explode, and symlog where half of the damages would be
    lost on a linear one. Raises `ValueError` listing the choices for an unknown perturbation, x,
    y, where, point, effect or downstream.
    """
    rows, styles = _rows(
        frame, x, y, perturbation=perturbation, where=where, point=point, effect=effect,
        downstream=downstream,
    )  # fmt: skip
    with canvas(ax, height=2.5) as ax:
        lines = _draw(ax, rows, styles, x, y)
        note_seeds(ax, rows)
        label_ends(ax, lines)
    return ax


def _rows(
    frame: pd.DataFrame | Any, x: str, y: str, **wanted: str
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Those with these values of their columns; the styles of all models."""
    frame = table_of(frame, "damage", [*CONDITION, "delta_nats"])
    check_choice("x", x, [name for name in X if name in frame])
    check_choice("y", y, [name for name in Y if name in frame])
    rows = frame
    for name, value in wanted.items():
        check_choice(name, value, rows[name].unique())
        rows = rows[rows[name] == value]
    if rows[x].isna().all():
        raise ValueError(f"perturbation {wanted['perturbation']!r} has no {x} to draw it over")
    return rows, model_styles(frame)


def _draw(
    ax: Axes, rows: pd.DataFrame, styles: dict[str, dict[str, Any]], x: str, y: str
) -> list[Line2D]:
    text, *bounds = Y[y]
    lines = draw_lines(ax, rows, styles, x, y, at="strength", bounds=bounds)
    if y.startswith("perplexity") and rows[y].max() > EXPLODED * rows[y].min():
        ax.set_yscale("log")
        ax.set_ylabel(text)
    else:
        change_axis(ax.yaxis, rows[y], text, zero=y.startswith("delta"))
    if (rows[x].dropna() % 1 == 0).all():
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    perturbation = rows.perturbation.iloc[0]
    strength = STRENGTH.get(perturbation, f"strength of {perturbation}")
    ax.set_xlabel(strength if x == "strength" else X[x])
    note_few(ax, rows)
    return lines


DOSES = ("strength", "mass_moved", "flips", "output_change")


def dose_panels(
    frame: pd.DataFrame | Any,
    perturbation: str = "GaussianNoise",
    doses: Sequence[str] = DOSES,
    y: str = "delta_nats",
    where: str = "all",
    point: str = "logits",
    effect: str = PLAIN["effect"],
    downstream: str = PLAIN["downstream"],
    ax: Any = None,
) -> Figure:
    """One perturbation's damage over each dose, two panels a row, on one scale of damage.

    ax   as many axes as there are doses; by default a figure two columns wide

    The rest is as in `damage_curve`, also what it raises.
    """
    wanted = dict(
        perturbation=perturbation, where=where, point=point, effect=effect, downstream=downstream
    )
    height = -(-len(doses) // 2)
    shape = (height, 2) if ax is None else (1, len(doses))
    with panels(ax, (PAGE_WIDTH, 2.1 * height), *shape, sharey=True) as axes:
        lines = []
        for one, dose in zip(axes, doses, strict=False):
            rows, styles = _rows(frame, dose, y, **wanted)
            lines.append(_draw(one, rows, styles, dose, y))
        for right in axes[1 : len(doses) : 2] if ax is None else axes[1:]:
            right.set_ylabel("")
        for empty in axes[len(doses) :]:
            empty.set_axis_off()
        note_seeds(axes[len(doses) - 1], rows)
        for one, drawn in zip(axes, lines, strict=False):  # on the scale of all
            label_ends(one, drawn)
    return axes[0].get_figure()


GAP_X = {"budget": "flips allowed per token", "flips": X["flips"]}
GAP_PARTS = {"worst": "the worst flips found", "random": "as many flips at random"}


def gap_curve(frame: pd.DataFrame | Any, x: str = "budget", ax: Any = None) -> Figure:
    """Damage of the worst flips over their number, beside that of as many random ones.

    frame   the table of `stats.gap`, or a Results; x: "budget", or "flips", what was made of it
    ax      two axes; by default a figure two columns wide

    Of flips a token, on one scale: the difference of the panels is the robustness gap. Raises
    `ValueError` for an unknown x and where only flips per sequence were measured.
    """
    frame = table_of(frame, "gap", ["condition", "part", "budget", "per", "delta_nats"])
    check_choice("x", x, [name for name in GAP_X if name in frame])
    per_token = frame.per == "token"
    if not per_token.any():
        raise ValueError("frame has flips per sequence only; the picture is of flips per token")
    styles, frame = model_styles(frame), frame[per_token]
    with panels(ax, (PAGE_WIDTH, 2.5), 1, 2, sharey=True) as axes:
        lines = []
        for one, (part, title) in zip(axes, GAP_PARTS.items(), strict=True):
            rows = frame[frame.part == part]
            lines.append(draw_lines(one, rows, styles, x, "delta_nats", at="budget"))
            change_axis(one.yaxis, frame[frame.part != "gap"].delta_nats)
            if x == "budget":
                one.xaxis.set_major_locator(MaxNLocator(integer=True))
            one.set(title=title, xlabel=GAP_X[x], ylabel=DELTA if part == "worst" else "")
            note_seeds(one, frame)
        for one, drawn in zip(axes, lines, strict=True):
            label_ends(one, drawn)
        note_few(axes[0], frame)
    return axes[0].get_figure()
