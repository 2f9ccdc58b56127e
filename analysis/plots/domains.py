"""Which experts a domain uses more than others do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots.matrices import (
    DIVERGING,
    color_bar,
    draw_matrix,
    name_experts,
    ratio_scale,
    sheet,
)
from analysis.plots.sites import metric_rows, one_site
from analysis.plots.style import COLUMN_WIDTH
from analysis.stats.pairs import check_columns


def specialization(
    overlap: Any,
    *,
    layer: int,
    stage: int,
    model: str | None = None,
    train_seed: int | None = None,
) -> Figure:
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
    table = table.reindex(rows.domain.unique())[_by_strongest(table.reindex(rows.domain.unique()))]
    height = 1.3 + max(0.16 * len(table), 0.6)
    with sheet(COLUMN_WIDTH, height, layout="constrained") as figure:
        ax = figure.subplots()
        image = draw_matrix(ax, table, ratio_scale(1.0, table), DIVERGING, aspect="auto")
        name_experts(ax, "x", table.columns, "expert")
        ax.set_yticks(range(len(table)), table.index)
        ax.set_title(title)
        color_bar(image, ax, "share of the domain's routing / null", location="bottom", aspect=40)
    return figure


def _by_strongest(table: pd.DataFrame) -> list[int]:
    """Columns in the order of the row of their maximum, greater ones first; NaN last."""
    filled = table.fillna(-np.inf).to_numpy()
    best, peak = filled.argmax(0), filled.max(0)
    return table.columns[np.lexsort((-peak, best, np.isneginf(peak)))].tolist()
