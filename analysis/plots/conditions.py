"""Conditions of each model, a dot each: all that there are; what disabling the first choice costs
beside the controls that give it its meaning; by which routers and which reading of "disabled"."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from analysis.plots.dots import Look, checkpoint_names, dot_rows, figure_height
from analysis.plots.marks import note_few
from analysis.plots.style import canvas, filled, model_styles, table_of
from analysis.stats import CHECKPOINT, CONDITION, PLAIN, check_choice, find, label

ROW, LINE = 0.13, 0.05  # inches of a row beside its models, and of a model in it
WRAP = 32  # characters of a label in one line


def catalogue_dots(
    frame: pd.DataFrame | Any, models: list[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Change of loss under all conditions, with intervals, those of one perturbation together.

    models   by default all; a model's seeds stand in its color in one line. Lines divide
             perturbations; the axis is symlog where a linear one would hide half of them. Raises
             `ValueError` for an unknown model.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    for model in models or ():
        check_choice("models", model, styles)
    frame = frame[frame.model.isin(styles if models is None else models)]
    labels = frame.drop_duplicates("label")
    # Perturbations as they come; of each the plain conditions first, then by what is other.
    rank, other = pd.factorize(labels["name"])[0], labels[list(PLAIN)] != list(PLAIN.values())
    labels = labels.assign(rank=rank, other=other.sum(axis=1))
    labels = labels.sort_values(["rank", "other", *reversed(PLAIN)], kind="stable")
    names = checkpoint_names(frame[CHECKPOINT].itertuples(index=False, name=None))
    series = {
        name: Look(styles[model]["marker"], filled(styles[model]), styles[model]["color"])
        for (model, *_), name in names.items()
    }
    cells = {
        (row.label, names[row.model, row.family, row.train_seed]): row for row in frame.itertuples()
    }
    rows = {label: (textwrap.fill(label, WRAP), "black") for label in labels.label}
    lines = max(1 + text.count("\n") for text, _ in rows.values())
    row = max(ROW + LINE * (len(series) - 1), ROW + 0.09 * (lines - 1))
    legend = 0.12 * ((len(series) - 1) // 3)
    with canvas(ax, figure_height(len(rows), row) + legend) as ax:
        dot_rows(ax, rows, series, cells, columns=3)
        note_few(ax, frame, above=True)
        ax.tick_params(axis="y", labelsize=6)
        for i, (above, below) in enumerate(pairwise(labels["name"])):
            if above != below:
                ax.axhline(i + 0.5, color="#A0A0A0", lw=0.5, zorder=0.2)
    return ax


# In the order of the damage that a working router should show; only the subject is filled.
CONDITIONS = {
    "DropUnchosen(1)": Look("v", 0.0),
    "DropChosen(1)": Look("^", 0.0),
    "DropTop(1)": Look("o"),
    "RandomRouting": Look("s", 0.0),
    "NoRouted": Look("x", 0.0),
}


def control_dots(frame: pd.DataFrame | Any, ax: Axes | None = None) -> Axes:
    """DropTop(1) beside DropUnchosen, DropChosen, RandomRouting and NoRouted, per checkpoint.

    Everywhere at once and on logits, with intervals; RandomRouting at its greatest strength.
    A number behind a model's name is its train_seed. Raises `ValueError` if none was run.
    """
    frame = table_of(frame, "damage", [*CONDITION, "name", "label", "delta_nats"])
    styles = model_styles(frame)
    found = {
        (key, name): row
        for key, mine in frame.groupby(CHECKPOINT, sort=False)
        for name in CONDITIONS
        for row in find(mine, name).tail(1).itertuples()
    }
    if not found:
        raise ValueError(f"frame has none of the conditions {', '.join(CONDITIONS)}")
    names = checkpoint_names(key for key, _ in found)
    rows = {key: (name, styles[key[0]]["color"]) for key, name in names.items()}
    with canvas(ax, figure_height(len(rows))) as ax:
        dot_rows(ax, rows, CONDITIONS, found)
        note_few(ax, frame, above=True)
    return ax


POINTS = {"logits": Look("o"), "scores": Look("D", 0.0)}


def stage_dots(
    frame: pd.DataFrame | Any, condition: str = "DropTop(1)", ax: Axes | None = None
) -> Axes:
    """One condition everywhere and at each stage alone, masked before or after the scores.

    A checkpoint with a single stage has one row: that stage alone is everywhere. Raises
    `ValueError` listing the conditions if this one was not run everywhere or at a stage.
    """
    frame = table_of(frame, "damage", [*CONDITION, "delta_nats"])
    is_site = (frame["where"] == "all") | frame["where"].str.match(r"stage \d+$")
    plain = (frame.effect == PLAIN["effect"]) & (frame.downstream == PLAIN["downstream"])
    rows = frame[is_site & plain & frame.point.isin(list(POINTS))]
    base = label(rows.assign(where=PLAIN["where"], point=PLAIN["point"]))
    check_choice("condition", condition, base.unique())
    rows = rows[base == condition]
    styles = model_styles(frame)
    checkpoints = dict(list(rows.groupby(CHECKPOINT, sort=False)))
    names: dict[Any, tuple[str, str]] = {}
    cells: dict[Any, Any] = {}
    for key, name in checkpoint_names(checkpoints).items():
        mine = checkpoints[key]
        places = sorted(mine["where"].unique())  # "all" comes first
        if len(places) == 2 and "all" in places:
            places = ["all"]
        for place in places:
            found = mine[mine["where"] == place].itertuples()
            cells |= {((key, place), row.point): row for row in found}
            names[key, place] = name if place == places[0] else place, styles[key[0]]["color"]
    with canvas(ax, figure_height(len(names))) as ax:
        dot_rows(ax, names, POINTS, cells)
        note_few(ax, rows, above=True)
        ax.legend_.set_title("mask on")
    return ax
