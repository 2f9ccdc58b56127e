"""Damage taken apart: with and without the routers behind; divided into set, weights and mass."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.plots.dots import Look, cells_of, dot_rows, figure_height, sections_of
from analysis.plots.marks import baseline, name_rows, note_few, note_seeds, offsets
from analysis.plots.names import key, legend_above
from analysis.plots.style import DELTA, PAGE_WIDTH, canvas, ink, panels, under

# Part of the table -> what it is called; the difference has a panel of its own.
ARMS = {"reroute": "later routers react", "replay": "later routers frozen"}
LOOKS = {ARMS["reroute"]: Look("o"), ARMS["replay"]: Look("o", 0.0)}
DIFFERENCE = {"difference": Look("D", 0.0)}


def cascade_dots(frame: pd.DataFrame | Any, condition: str | None = None, ax: Any = None) -> Figure:
    """Damage where later routers react to the changed stream and where they are frozen, repeating
    the clean run; in a second panel the difference of both: what their reaction adds.

    frame       the table of `stats.cascade`, or a Results
    condition   a label; None: all, a row each
    ax          two axes; by default a figure two columns wide
    """
    frame, styles = under(condition, frame, "cascade", ["part", "delta_nats"])
    sections = list(enumerate(sections_of(frame)))
    rows = {
        i: (title, styles[model]["color"] if model else ink()) for i, (title, model, _) in sections
    }
    names = {**ARMS, "cascade": "difference"}
    cells = cells_of(
        ((i, names[row.part]), row) for i, (*_, own) in sections for row in own.itertuples()
    )
    size = (PAGE_WIDTH, figure_height(len(rows), 0.2))
    with panels(ax, size, 1, 2, width_ratios=(3, 2)) as axes:
        dot_rows(axes[0], rows, LOOKS, cells)
        dot_rows(axes[1], rows, DIFFERENCE, cells, columns=0)
        axes[1].set(xlabel="difference (nats per token)", title="added by their reaction")
        axes[1].tick_params(labelleft=False)
        note_few(axes[0], frame, above=True)
        for one in axes:
            note_seeds(one, frame)
    return axes[0].get_figure()


# Steps of the waterfall; hatches for a print in grey.
STEPS: dict[str, dict[str, Any]] = {
    "set alone": dict(fc="#004488", ec="#004488", lw=0.5),
    "weights alone": dict(fc="#DDAA33", ec="white", lw=0.5, hatch="////"),
    "mass alone": dict(fc="#009E73", ec="white", lw=0.5, hatch="...."),
    "interaction": dict(fc="none", lw=0.7),  # with an edge of the style's ink
}
NOTHING = 0.02  # a step that is smaller in all rows, as a share of the greatest, is left out


def split_bars(
    frame: pd.DataFrame | Any, condition: str | None = None, ax: Axes | None = None
) -> Axes:
    """A waterfall: what the set alone, the weights alone and the mass alone would cost, one after
    the other, and the interaction, which leads from their sum back to the damage of the whole.

    frame       the table of `stats.split`, or a Results
    condition   a label; None: all, a row each

    The interaction is negative where either alone does the damage that both do together. Lines are
    intervals over documents of each step, at its end; of several training seeds it is their mean,
    without intervals. Steps that are next to nothing in all rows are left out.
    """
    frame, _ = under(condition, frame, "split", ["part", "delta_nats"])
    sections = list(sections_of(frame))
    single = frame.groupby("model").train_seed.nunique().max() == 1
    size = frame[frame.part.isin(STEPS)].groupby("part").delta_nats.apply(lambda v: v.abs().max())
    steps = [step for step in STEPS if size[step] >= NOTHING * size.max()]
    height, shifts = 0.8 / len(steps), offsets(steps, 0.8)
    looks = {step: {"ec": ink()} | STEPS[step] for step in steps}
    with canvas(ax, 1.15 + (0.12 + 0.1 * len(steps)) * len(sections)) as ax:
        for i, (_, model, rows) in enumerate(sections):
            if not model:
                continue
            parts = rows.groupby("part")[["delta_nats", "low", "high"]].mean()
            end = 0.0
            for step in steps:
                start, at = end, i + shifts[step]
                value, low, high = parts.loc[step]
                end = start + value
                ax.barh(at, value, height, start, **looks[step])
                if single:
                    ax.plot([start + low, start + high], [at, at], color=ink(1), lw=0.8)
                if step != steps[-1]:  # to the next step
                    ax.plot([end, end], [at, at + height], color=ink(), lw=0.5, ls=":")
            whole = parts.delta_nats["full"]
            ax.plot(whole, i + 0.42, "^", color=ink(1), ms=4, clip_on=False)
        ax.axvline(0, **baseline())
        name_rows(ax, [title for title, _, _ in sections])
        note_few(ax, frame, above=True)
        ax.set_xlabel(DELTA)
        note_seeds(ax, frame)
        handles = [Patch(**looks[step], label=step) for step in steps]
        whole = key("damage of the whole", color=ink(1), marker="^", ms=4, ls="")
        legend_above(ax, [*handles, whole], ncols=2, right=True)
    return ax
