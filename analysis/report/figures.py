"""The figures of a study: of each its table, its picture and what it shows, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import plots, stats
from analysis.measure import Results

SUBJECT = "DropTop(1)"
NOISE, TOP = r"GaussianNoise\([^,]+\)", r"DropTop\(\d+\)"
STAGES = r"DropTop\(1\)(, stage \d+)?(, scores)?"
CONTROLS = (SUBJECT, "DropChosen(1)", "DropUnchosen(1)", "RandomRouting", "NoRouted")
Table = Callable[[Results], pd.DataFrame]
Rows = Callable[[pd.DataFrame], pd.DataFrame]


def every(table: pd.DataFrame) -> pd.DataFrame:
    """All rows."""
    return table


def where(column: str, pattern: str) -> Rows:
    """Those rows in which that column fits the pattern, whole."""
    return lambda table: table[table[column].str.fullmatch(pattern)]


def controls(damage: pd.DataFrame) -> pd.DataFrame:
    """DropTop(1) and what stands beside it; of random routing the greatest share."""
    found = [
        stats.find(rows, name).tail(1)
        for _, rows in damage.groupby(stats.CHECKPOINT, sort=False)
        for name in CONTROLS
    ]
    return pd.concat(found)


class Shown(NamedTuple):
    """One figure.

    table     what it is drawn from, without rows where the study has nothing of it
    picture   draws that table
    says      a sentence: what is drawn; its caption begins with it
    rows      those of the table that are drawn
    subject   those of them that it is there for, of which the caption tells the ends
    """

    table: Table
    picture: Callable[[pd.DataFrame], Axes | Figure]
    says: str
    rows: Rows = every
    subject: Rows = every


def fitting(pattern: str) -> Table:
    """The table of damage if a label (see `stats.label`) fits the pattern, else none of it."""

    def table(results: Results) -> pd.DataFrame:
        damage = results.damage(full=True)
        return damage if damage.label.str.fullmatch(pattern).any() else damage[:0]

    return table


def of_tokens(table: Table) -> Table:
    """That table of DropTop(1) if it was measured and every token's loss was kept."""
    subject = fitting(re.escape(SUBJECT))
    return lambda r: table(r) if r.tokens and len(subject(r)) else pd.DataFrame()


def flips_per_token(results: Results) -> pd.DataFrame:
    """The robustness gaps that stand on one axis."""
    gap = results.gap()
    return gap[gap.per == "token"] if len(gap) else gap


FIGURES = {
    "controls": Shown(
        fitting(re.escape(SUBJECT)),
        plots.control_dots,
        "What each token's first choice is worth: change of loss when it is disabled (DropTop(1)), "
        "beside the controls: an expert that the token does not use, any one that it uses, routing "
        "of another token, and no routed expert at all.",
        controls,
        where("label", re.escape(SUBJECT)),
    ),
    "droptop_strength": Shown(
        fitting(TOP),
        lambda t: plots.damage_curve(t, "DropTop"),
        "Change of loss over the number of highest-ranked experts that are disabled for each "
        "token, a line for each model.",
        where("label", TOP),
    ),
    "droptop_mass": Shown(
        fitting(TOP),
        lambda t: plots.damage_curve(t, "DropTop", x="mass_moved"),
        "Change of loss when highest-ranked experts are disabled, over the routing mass that this "
        "moves (total variation between a token's clean and perturbed weights).",
        where("label", TOP),
    ),
    "noise_strength": Shown(
        fitting(NOISE),
        lambda t: plots.damage_curve(t, "GaussianNoise"),
        "Change of loss over the standard deviation of Gaussian noise on the router's logits, in "
        "units of each token's own.",
        where("label", NOISE),
    ),
    "noise_mass": Shown(
        fitting(NOISE),
        lambda t: plots.damage_curve(t, "GaussianNoise", "mass_moved"),
        "Change of loss under noise on the router's logits, over the routing mass that it moves: "
        "a standard deviation means something else in every model.",
        where("label", NOISE),
    ),
    "noise_doses": Shown(
        fitting(NOISE),
        lambda t: plots.dose_panels(t, "GaussianNoise"),
        "Change of loss under noise on the router's logits, over four doses: its standard "
        "deviation, mass moved, experts exchanged, and the relative change of the layer's output.",
        where("label", NOISE),
    ),
    "stages": Shown(
        fitting(STAGES),
        plots.stage_dots,
        "Change of loss when the first choice is disabled in all routers and at each stage alone, "
        "masked on logits or on scores (after the softmax).",
        where("label", STAGES),
        where("label", re.escape(SUBJECT)),
    ),
    "catalogue": Shown(
        lambda r: r.damage(full=True),
        plots.catalogue_dots,
        "Change of loss under every condition of the study, by what they do to routing, in each "
        "group the one that costs the median model most first.",
    ),
    "split": Shown(
        lambda r: r.split(),
        plots.split_bars,
        "What a changed decision would cost with the other set of experts alone, the other weights "
        "alone, and the lost mass alone, one after the other, and the interaction that leads from "
        "their sum back to the damage of the whole.",
        where("part", ".* alone|interaction|full"),
    ),
    "cascade": Shown(
        lambda r: r.cascade(),
        plots.cascade_dots,
        "Damage with later routers reacting to the changed stream, and with them frozen in their "
        "clean decisions; beside it the difference, which is the cascade.",
        subject=where("part", "cascade"),
    ),
    "layers": Shown(
        lambda r: r.additivity(),
        plots.layer_profile,
        "Damage at each router alone over the depth of the model; beside it their sum, and the "
        "damage at all of them at once.",
        subject=where("part", "layer.*"),
    ),
    "gap": Shown(
        flips_per_token,
        plots.gap_curve,
        "Damage of the worst flips of experts that were found within a budget, and of as many "
        "random ones beside it on one scale; the difference is the robustness gap.",
        subject=where("part", "gap"),
    ),
    "tails": Shown(
        of_tokens(lambda r: r.tail_curve([SUBJECT])),
        plots.tail_shares,
        "Share of the damage of DropTop(1) that its worst tokens carry; above 1 where the other "
        "tokens gain.",
    ),
    "position": Shown(
        of_tokens(lambda r: r.damage_by("position", [SUBJECT])),
        plots.group_curve,
        "Damage of DropTop(1) over the position of a token in its sequence.",
    ),
    "frequency": Shown(
        of_tokens(lambda r: r.damage_by("frequency", [SUBJECT])),
        plots.group_curve,
        "Damage of DropTop(1) over how frequent a token is in the text.",
    ),
}


def shown_in(results: Results) -> Iterator[tuple[str, Shown, pd.DataFrame]]:
    """(name, figure, its table) of those that the study has the conditions for."""
    for name, shown in FIGURES.items() if results.has_conditions else ():
        table = shown.table(results)
        if not table.empty:
            yield name, shown, table


def drawn(shown: Shown, table: pd.DataFrame, results: Results) -> Figure:
    """The picture, marked if the study is unfinished."""
    drawing = shown.picture(table)
    figure = getattr(drawing, "figure", drawing)
    if unfinished := unfinished_text(results):
        figure.supxlabel(unfinished, fontsize=7, color="#B3261E")
    return figure


def unfinished_text(results: Results) -> str:
    """ "Unfinished: 120 of 214 cells"; "" of a finished study."""
    done, planned = results.finished, results.planned
    return f"Unfinished: {done} of {planned} cells" if done < planned else ""
