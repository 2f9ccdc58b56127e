"""Conditions of each model, a dot each: all that there are; what disabling the first choice costs
beside the controls that give it its meaning; by which routers and which reading of "disabled"."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Cells, Look, cells_of, dot_rows, figure_height
from analysis.plots.marks import note_few, note_seeds
from analysis.plots.style import canvas, filled, ink, model_styles, table_of
from analysis.stats import CONDITION, PLAIN, check_choice, find, label

ROW, LINE = 0.12, 0.03  # inches of a row beside its models, and of a model in it
WRAP = 34  # characters of a label in one line

GROUPS = {
    "experts taken away": (
        *("DropTop", "KeepRanks", "TopK", "DropExperts", "DropSlots", "DropChosen"),
        *("DropUnchosen", "NoRouted"),
    ),
    "logits moved": (
        *("GaussianNoise", "GumbelNoise", "Temperature", "SwapRanks", "Quantize"),
        "RandomRouting",
    ),
    "decisions replaced": ("UniformWeights", "Lag", "Replay", "GateSwap", "Worst"),
    "controls and others": ("Identity", "ResidualNoise"),  # and whatever stands nowhere here
}


def catalogue_dots(
    frame: pd.DataFrame | Any, models: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Change of loss under all conditions with intervals, by what they do to routing; in each group
    the one that costs the median model most comes first.

    models   by default all; a model's seeds stand in its color in one line. The axis is symlog
             where a linear one would hide half of them, and linear within the tinted zone. Raises
             `ValueError` for an unknown model.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    for model in models or ():
        check_choice("models", model, styles)
    frame = frame[frame.model.isin(styles if models is None else models)]
    rows = _grouped(frame)
    series = {
        model: Look(style["marker"], filled(style), style["color"])
        for model, style in styles.items()
        if model in set(frame.model)
    }
    cells = cells_of(((row.label, row.model), row) for row in frame.itertuples())
    lines = max(1 + text.count("\n") for text, _ in rows.values())
    height = max(ROW + LINE * (len(series) - 1), ROW + 0.09 * (lines - 1))
    legend = 0.12 * ((len(series) - 1) // 3)
    with canvas(ax, figure_height(len(rows), height) + legend) as ax:
        dot_rows(ax, rows, series, cells, columns=3)
        note_few(ax, frame, above=True)
        note_seeds(ax, frame)
        ax.tick_params(axis="y", labelsize=6)
    return ax


def _grouped(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Rows of a picture: a heading a group, then its conditions, the costliest first."""
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    last = list(GROUPS)[-1]
    cost = frame.groupby(["name", "label"]).delta_nats.median().reset_index()
    cost["group"] = cost["name"].map(group_of).fillna(last)
    rows = {}
    for group in GROUPS:
        own = cost[cost.group == group].sort_values("delta_nats", ascending=False, kind="stable")
        if len(own):
            rows[group] = (group, ink())
            rows |= {text: (textwrap.fill(text, WRAP), ink()) for text in own.label}
    return rows


# In the order of the damage that a working router should show; only the subject is filled.
CONDITIONS = {
    "DropUnchosen(1)": Look("v", 0.0),
    "DropChosen(1)": Look("^", 0.0),
    "DropTop(1)": Look("o"),
    "RandomRouting": Look("s", 0.0),
    "NoRouted": Look("x", 0.0),
}


def control_dots(frame: pd.DataFrame | Any, ax: Axes | None = None) -> Axes:
    """DropTop(1) beside DropUnchosen, DropChosen, RandomRouting and NoRouted, a row a model.

    Everywhere at once and on logits, with intervals; RandomRouting at its greatest strength. Of
    several training seeds each is a small dot beside their mean. Raises `ValueError` if none was
    run.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    cells = cells_of(
        ((model, name), row)
        for (model, _), mine in frame.groupby(["model", "train_seed"], sort=False)
        for name in CONDITIONS
        for row in find(mine, name).tail(1).itertuples()
    )
    if not cells:
        raise ValueError(f"frame has none of the conditions {', '.join(CONDITIONS)}")
    rows = {model: (model, styles[model]["color"]) for model, _ in cells}
    with canvas(ax, figure_height(len(rows))) as ax:
        dot_rows(ax, rows, CONDITIONS, cells)
        note_few(ax, frame, above=True)
        note_seeds(ax, frame)
    return ax


POINTS = {"logits": Look("o"), "scores": Look("D", 0.0)}


def stage_dots(
    frame: pd.DataFrame | Any, condition: str = "DropTop(1)", ax: Axes | None = None
) -> Axes:
    """One condition everywhere and at each stage alone, masked before or after the scores.

    A model with a single stage has one row: that stage alone is everywhere. Raises `ValueError`
    listing the conditions if this one was not run everywhere or at a stage.
    """
    frame = table_of(frame, "damage", [*CONDITION, "delta_nats"])
    is_site = (frame["where"] == "all") | frame["where"].str.match(r"stage \d+$")
    plain = (frame.effect == PLAIN["effect"]) & (frame.downstream == PLAIN["downstream"])
    found = frame[is_site & plain & frame.point.isin(list(POINTS))]
    base = label(found.assign(where=PLAIN["where"], point=PLAIN["point"]))
    check_choice("condition", condition, base.unique())
    found = found[base == condition]
    styles = model_styles(frame)
    rows: dict[Any, tuple[str, str]] = {}
    cells: Cells = cells_of(
        (((row.model, place), row.point), row)
        for place, own in found.groupby("where")
        for row in own.itertuples()
    )
    for model, own in found.groupby("model", sort=False):
        places = sorted(own["where"].unique())  # "all" comes first
        if len(places) == 2 and "all" in places:
            places = ["all"]
        for place in places:
            name = model if len(places) == 1 else f"{model}, {place}"
            rows[model, place] = name, styles[model]["color"]
    with canvas(ax, figure_height(len(rows))) as ax:
        dot_rows(ax, rows, POINTS, cells)
        note_few(ax, found, above=True)
        note_seeds(ax, found)
        if ax.legend_:
            ax.legend_.set_title("mask on")
    return ax
