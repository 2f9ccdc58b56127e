"""A metric of pairs of experts at one site beside what chance would give; experts by domains; what
it costs that one expert runs in another's place, and how far the linear estimate of it holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from analysis.plots.marks import baseline, face
from analysis.plots.matrices import (
    centered_scale,
    color_bar,
    draw_matrix,
    draw_panels,
    linear_scale,
    name_experts,
    ratio_scale,
)
from analysis.plots.names import legend_above
from analysis.plots.rows import metric_rows, one_site
from analysis.plots.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    canvas,
    check_rows,
    model_styles,
    panels,
)
from analysis.stats import SHARED, SITE, check_columns, facts_of, square


def overlap_heatmap(
    overlap: Any,
    metric: str,
    *,
    layer: int | None = None,
    stage: int | None = None,
    model: str | None = None,
    train_seed: int | None = None,
    null: bool = True,
    clustered: bool = False,
    ax: Any = None,
) -> Figure:
    """A metric of pairs of experts, row i and column j, beside its null on the same scale of color.

    overlap    an object with a table `pairs`, such as an Overlap, or that table
    layer, stage   by default the first site measured; model, train_seed: of one of several
    null       draw the null too, where there is one; two panels are two columns wide
    ax         one axes, for the metric alone, or two; by default a new figure
    clustered  experts in the order of average linkage of (m_ij + m_ji) / 2, that of the values
               also in the null

    The diagonal, and whatever is NaN, is grey, of which a legend tells where it is more than the
    diagonal: experts that no token used. A shared expert comes last. A lift has a log scale around
    the median of its null. Raises `ValueError` with the choices for a metric that is not of
    pairs, an unknown site, several steps of training, and several checkpoints of which none is
    named; and for clustering experts of two different sites.
    """
    rows, facts = metric_rows(overlap, metric, "pairs"), facts_of(metric)
    rows, title = one_site(rows, layer, stage, model, train_seed)
    tables = {"measured": square(rows)}
    if null and rows.null.notna().any() and (ax is None or np.size(ax) > 1):
        tables["null"] = square(rows, "null")
    if clustered:
        if facts.across:
            raise ValueError(
                f"clustered is True, but pairs of {metric!r} are of two sites' experts"
            )
        order = _order(tables["measured"], facts.apart)
        tables = {name: table.loc[order, order] for name, table in tables.items()}
    scale = linear_scale(*tables.values())
    if facts.ratio:
        center = rows.null[rows.null > 0].median() if (rows.null > 0).any() else 1.0
        scale = ratio_scale(center, *tables.values())
    y = "expert i at the site before" if facts.across else "expert i"
    text = facts.label + ("\n(white: median of the null)" if facts.ratio else "")
    size = (PAGE_WIDTH, 3.1) if len(tables) == 2 else (COLUMN_WIDTH, 2.8)
    with panels(ax, size, 1, len(tables), layout="compressed") as axes:
        draw_panels(axes, tables, scale, "expert j", y, text, title=title)
    return axes[0].get_figure()


def _order(table: pd.DataFrame, distance: bool) -> list[int]:
    """Numbers of experts, those next to each other that are alike; a shared one stays last."""
    routed = [expert for expert in table.index if expert != SHARED]
    own = table.loc[routed, routed].to_numpy(dtype=float)
    far = ((own + own.T) / 2 * (1 if distance else -1))[np.triu_indices(len(routed), 1)]
    if np.isnan(far).all():
        return list(table.index)
    far = np.where(np.isnan(far), np.nanmax(far), far) - np.nanmin(far)
    leaves = leaves_list(linkage(far, "average", optimal_ordering=True))
    return [routed[leaf] for leaf in leaves] + list(table.index[len(routed) :])


def specialization(
    overlap: Any,
    *,
    layer: int,
    stage: int,
    model: str | None = None,
    train_seed: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Domain specialization (OLMoE, arXiv 2409.02060, eq. 7) over its null, on a log scale: a
    column an expert, a row a domain.

    overlap  an object with the table `experts`, such as an Overlap, or that table, in which
             "domain_specialization" was measured; model and train_seed: of one of several

    White is the null. Experts stand in the order of the domain that uses them most beyond it, the
    most special first; grey ones have a null of 0. Raises `ValueError` with the choices for an
    unknown site, and several checkpoints of which none is named.
    """
    rows = metric_rows(overlap, "domain_specialization", "experts")
    check_columns("experts", rows, ["domain"])
    rows, title = one_site(rows, layer, stage, model, train_seed)
    rows = rows.assign(ratio=(rows.value / rows.null).where(rows.null > 0))
    table = rows.pivot(index="domain", columns="expert", values="ratio")
    table = table.reindex(rows.domain.unique())
    table = table[_by_strongest(table)]
    with canvas(ax, 1.3 + max(0.16 * len(table), 0.6)) as ax:
        image = draw_matrix(ax, table, ratio_scale(1.0, table), aspect="auto")
        name_experts(ax, "x", table.columns, "expert")
        ax.set_yticks(range(len(table)), table.index)
        ax.set_title(title)
        color_bar(image, ax, "share of the domain's routing / null", location="bottom", aspect=40)
    return ax


def _by_strongest(table: pd.DataFrame) -> list[int]:
    """Columns in the order of the row of their maximum, greater ones first; NaN last."""
    filled = table.fillna(-np.inf).to_numpy()
    best, peak = filled.argmax(0), filled.max(0)
    return table.columns[np.lexsort((-peak, best, np.isneginf(peak)))].tolist()


CHOSEN = {"lowest": ("lowest estimates", True), "random": ("at random", False)}  # name, filled
MEASURED = ["linear", "measured", "low", "high", "chosen"]


def substitution_matrix(
    frame: pd.DataFrame | Any,
    *,
    layer: int,
    stage: int,
    model: str | None = None,
    train_seed: int | None = None,
    ax: Any = None,
) -> Figure:
    """The linear estimate of what it costs that expert j runs for i; white costs nothing.

    frame  the table of `analysis.substitution`, or an Overlap (or its table `pairs`) in
           which "substitution" was measured; the former has a second panel, two columns wide in
           all: what real forwards measured against the estimate, with intervals, and the line on
           which both are equal

    In nats per token routed to expert i; red costs, blue gains. model and train_seed: of one of
    several; ax: as many axes as panels, by default a new figure. Raises `ValueError` with the
    choices for an unknown site or checkpoint, and for frames in which later routers were treated in
    more than one way.
    """
    measured = isinstance(frame, pd.DataFrame) and "linear" in frame
    if measured:
        check_rows("substitution", frame, [*SITE, "expert_i", "expert_j", *MEASURED])
        if "downstream" in frame and frame.downstream.nunique() > 1:
            ways = ", ".join(map(repr, frame.downstream.unique()))
            raise ValueError(f"downstream is {ways} in one frame; give the rows of one of them")
        rows = frame
    else:
        rows = metric_rows(frame, "substitution", "pairs")
    styles = model_styles(rows)
    rows, title = one_site(rows, layer, stage, model, train_seed)
    table = square(rows, "linear" if measured else "value")
    size = (PAGE_WIDTH, 3.0) if measured else (COLUMN_WIDTH, 2.8)
    with panels(ax, size, 1, 1 + measured) as axes:
        names = "by expert j", "expert i replaced", facts_of("substitution").label
        scale = centered_scale(table)
        draw_panels(axes[:1], {"estimate": table}, scale, *names, title=title, shrink=0.9)
        if measured:
            _calibration(axes[1], rows[rows.measured.notna()], styles[rows.model.iloc[0]])
    return axes[0].get_figure()


def _calibration(ax: Axes, rows: pd.DataFrame, style: dict[str, Any]) -> None:
    color, marker = style["color"], style["marker"]
    ax.axline((0, 0), slope=1, **baseline())
    for chosen, (name, filled) in CHOSEN.items():
        own = rows[rows.chosen == chosen]
        if len(own):
            ax.vlines(own.linear, own.low, own.high, color=color, lw=0.7, alpha=0.6)
            ax.plot(own.linear, own.measured, marker, **face(color, filled), mew=0.9, label=name)
    per = "(nats per routed token)"
    ax.set(xlabel=f"linear estimate {per}", ylabel=f"measured {per}")
    if len(rows):
        legend_above(ax, ncols=2)
