"""Lines along other things than doses: the depth of a model (damage, or a metric of
overlap), positions, frequencies and domains of tokens, the share of them that is worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.plots.marks import baseline, draw_lines, note_few, note_seeds, offsets
from analysis.plots.names import key, label_ends, legend_above
from analysis.plots.rows import metric_rows
from analysis.plots.scales import change_axis
from analysis.plots.style import canvas, ink, model_styles, under
from analysis.stats import CHECKPOINT, INDEX, SHARED, check_choice, facts_of, sites_in


def overlap_profile(overlap: Any, metric: str, ax: Axes | None = None) -> Axes:
    """A metric at each site of each model, beside its null (dashes; dotted where lines join them).

    overlap  an object with the tables pairs, experts and sites, such as an Overlap, or one of them

    Of pairs or experts it is the mean over them, and the vertical line is their spread: from the
    lower to the upper quartile, no interval. Of a site's own metric the line is its interval over
    documents. A shared expert does not enter, as not all families have one. The second stage of a
    layer stands half a layer behind its first, at a short tick. Raises `ValueError` with the
    choices for an unknown metric and for several steps of training.
    """
    rows = metric_rows(overlap, metric, "pairs", "experts", "sites")
    index = [name for name in INDEX["pairs"] + INDEX["experts"] if name in rows]
    rows = rows[(rows[index] != SHARED).all(axis=1)]
    styles = model_styles(rows)
    sites = rows.assign(x=depth(rows))
    if index:
        by_site = sites.groupby([*CHECKPOINT, "x"], sort=False)
        sites = by_site[["value", "null"]].mean()
        sites["low"], sites["high"] = by_site.value.quantile(0.25), by_site.value.quantile(0.75)
        sites = sites.reset_index()
    sites = sites.sort_values("x")
    sites["x"] += sites.model.map(offsets(list(styles), 0.3))
    dots = dots_between(rows)
    with canvas(ax, height=2.5) as ax:
        draw_lines(ax, sites, styles, "x", "value", bars=True, **dots)
        for model, line in sites.groupby("model", sort=False):
            null = line.groupby("x").null.mean()
            look = dict(color=styles[model]["color"], lw=0.8, marker="_", ms=6)
            ax.plot(null.index, null, ls="" if dots else ":", **look)
        depth_axis(ax, rows, "layer")
        ax.set_ylabel(facts_of(metric).label + ("\nmean, quartiles" if index else ""))
        note_seeds(ax, sites)
        handles = ax.get_legend_handles_labels()[0]
        if rows.null.notna().any():
            handles.append(key("null", color=ink(), lw=0.8, ls="" if dots else ":", marker="_"))
        # Long handles: a dash must be seen on both sides of a marker.
        legend_above(ax, handles, handlelength=2.8)
    return ax


JOINED = 4  # layers from which on lines join sites: between two of them a line tells of nothing


def dots_between(rows: pd.DataFrame) -> dict[str, str]:
    """How sites of so few layers look: not joined."""
    return {} if rows.layer.nunique() >= JOINED else {"linestyle": ""}


WHOLES = ("sum", "joint")


def layer_profile(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """Damage at each site alone over the depth; to the right their sum, and all at once.

    frame       the table of `stats.additivity`, or a Results
    condition   the label of the joint condition, by default the first

    The second stage of a layer stands half a layer behind its first, at a short tick. Intervals
    over documents. Lines join the sites of four layers or more.
    """
    frame, styles = under(condition, frame, "additivity", ["part", "delta_nats"])
    condition = frame.condition.iloc[0]
    frame = frame[(frame.condition == condition) & (frame.part != "joint - sum")]
    sites = sites_in(frame.part)
    last = sites.layer.max()
    step = max(1.0, 0.15 * (last - sites.layer.min()))
    places = {name: last + step * (i + 1.5) for i, name in enumerate(WHOLES)}
    # Shares of a layer, so that a site is nearest to its tick.
    shift = frame.model.map(offsets(list(styles), 0.36))
    alone = frame.assign(x=depth(sites) + shift)
    whole = frame.assign(x=frame.part.map(places) + step * shift)
    dots = dots_between(sites)
    with canvas(ax, height=2.5) as ax:
        draw_lines(ax, alone, styles, "x", "delta_nats", "part", bars=True, **dots)
        draw_lines(ax, whole, styles, "x", "delta_nats", "part", bars=True, linestyle="")
        ax.axvline(last + 0.9 * step, color=ink(0.4), lw=0.6, ls=":")
        change_axis(ax.yaxis, frame.delta_nats)
        depth_axis(ax, sites, f"layer at which {condition} acts alone", places)
        note_few(ax, frame)
        note_seeds(ax, frame)
        legend_above(ax)
    return ax


def depth(rows: pd.DataFrame) -> pd.Series:
    """Where sites stand on an axis of layers: a second stage half a layer behind its first."""
    return rows.layer + rows.stage / (rows.stage.max() + 1)


def depth_axis(
    ax: Axes, rows: pd.DataFrame, label: str, ends: Mapping[str, float] | None = None
) -> None:
    """Tell on the x axis where `depth` puts these sites: a long tick at each layer, with numbers as
    far as there is room, a short one at each later stage, which the label explains.

    ends   names behind the last layer, and where
    """
    layers, ends = sorted(rows.layer.unique()), ends or {}
    step = max(1, round((len(layers) + 2 * len(ends)) / 8))
    numbers = ["" if i % step else str(layer) for i, layer in enumerate(layers)]
    ax.set_xticks([*layers, *ends.values()], [*numbers, *ends])
    later = rows.stage > 0
    if later.any():
        ax.set_xticks(depth(rows)[later].unique(), minor=True)
        stages = sorted(rows.stage[later].unique())
        label += f"\n(short ticks: stage {', '.join(map(str, stages))})"
    ax.set_xlabel(label)


GROUPS = {
    "position": "position in the sequence",
    "frequency": "times that the target occurs in the data",
    "domain": "domain",
}


GAIN = "below 0: these tokens gain"


def group_curve(
    frame: pd.DataFrame | Any,
    by: str = "position",
    condition: str = "DropTop(1)",
    ax: Axes | None = None,
) -> Axes:
    """Damage of groups of tokens with intervals over documents, a line per checkpoint.

    frame   the table of `stats.damage_by`, or a Results; the line breaks between domains, which
            have no order

    Below 0 a group gains: the disturbed model gives it more probability. That can be, as a clean
    model may be surest where it is wrong; where an interval lies below 0 the picture says so.
    Raises `ValueError` for an unknown condition.
    """
    columns = ["by", "group", "order", "delta_nats", "low", "high"]
    frame, styles = under(condition, frame, "damage_by", columns, by, [condition])
    by = frame.by.iloc[0]
    groups = frame.drop_duplicates("group").sort_values("order").group.tolist()
    shift = frame.model.map(offsets(list(styles), 0.4))
    frame = frame.assign(x=frame.group.map(groups.index) + shift)
    look = {"linestyle": ""} if by == "domain" else {}
    with canvas(ax, height=2.5) as ax:
        lines = draw_lines(ax, frame, styles, "x", "delta_nats", "group", bars=True, **look)
        change_axis(ax.yaxis, frame.delta_nats)
        if (frame.high < 0).any():
            note = dict(transform=ax.get_yaxis_transform(), ha="left", va="top", size=5.5)
            ax.text(0.01, 0, GAIN, color=ink(), **note)
        turned = sum(map(len, groups)) > 28
        turn = dict(rotation=40, ha="right", rotation_mode="anchor") if turned else {}
        ax.set_xticks(range(len(groups)), groups, **turn)
        ax.set_xlabel(GROUPS[by])
        note_few(ax, frame)
        note_seeds(ax, frame)
        if by == "domain":
            legend_above(ax)
        else:
            label_ends(ax, lines)
    return ax


TAIL_Y = {"carried": "share of the damage they carry", "rise": "rise of a token's loss (nats)"}


ABOVE_ONE = "all of the damage; above it: the other tokens gain"


def tail_shares(
    frame: pd.DataFrame | Any,
    condition: str = "DropTop(1)",
    y: str = "carried",
    ax: Axes | None = None,
) -> Axes:
    """Share of the damage carried by the worst tokens, or y "rise": the quantiles themselves.

    frame   the table of `stats.tail_curve`, or a Results with tokens kept

    A share above 1 is no mistake, and the picture says why: the other tokens gain, so that the
    worst lose more than all together. The dotted line is what an even spread over tokens would
    give. Raises `ValueError` for an unknown condition or y.
    """
    check_choice("y", y, TAIL_Y)
    frame, styles = under(condition, frame, "tail_curve", ["share", *TAIL_Y], [condition])
    with canvas(ax, height=2.4) as ax:
        draw_lines(ax, frame, styles, "share", y, marker="")
        handles = []
        note: dict[str, Any] = dict(ha="left", va="bottom", size=5.5, color=ink())
        if y == "carried":
            even = np.geomspace(frame.share.min(), 1, 50)
            ax.plot(even, even, color=ink(), lw=0.8, ls=":")
            handles = [key("evenly spread", color=ink(), lw=0.8, ls=":")]
            ax.axhline(1, **baseline())
            ax.text(0.01, 1, ABOVE_ONE, transform=ax.get_yaxis_transform(), **note)
        else:
            ax.axhline(0, **baseline())
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(numticks=8))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        ax.set_xlabel(f"worst tokens under {condition}")
        ax.set_ylabel(TAIL_Y[y])
        note_seeds(ax, frame)
        legend_above(ax, [*ax.get_legend_handles_labels()[0], *handles])
    return ax
