"""Damage against several doses at once: on which of them do families fall together?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots.curves import damage_curve
from analysis.plots.style import COLUMN_WIDTH, DELTA, damage_frame, paper_style

DOSES = ("strength", "mass_moved", "flips", "output_change")
SHORT = {  # a panel is half a column wide
    "mass_moved": "routed mass moved",
    "flips": "chosen experts changed",
    "flips_total": "changed, cascade too",
    "changed": "tokens changed",
    "mass_lost": "clean mass lost",
    "active": "experts used",
    "output_change": "output change / residual",
}


def dose_panels(
    frame: pd.DataFrame | Any,
    perturbation: str = "GaussianNoise",
    doses: Sequence[str] = DOSES,
    **options: Any,
) -> Figure:
    """One perturbation's damage over each dose, two panels a row, on one scale of damage.

    options   those of `damage_curve`; raises `ValueError` like it
    """
    frame = damage_frame(frame, ["delta_nats"])
    rows = -(-len(doses) // 2)
    with paper_style():
        figure, axes = plt.subplots(
            rows,
            2,
            figsize=(COLUMN_WIDTH, 1.6 * rows + 0.4),
            sharey=True,
            layout="constrained",
            squeeze=False,
        )
        try:
            for ax, dose in zip(axes.flat, doses, strict=False):
                damage_curve(frame, perturbation, x=dose, ax=ax, **options)
                handles = ax.legend_.legend_handles
                ax.legend_.remove()
                ax.set_ylabel("")
                ax.set_xlabel(SHORT.get(dose, ax.get_xlabel()), fontsize=7)
            for ax in axes.flat[len(doses) :]:
                ax.set_axis_off()
            figure.supylabel(DELTA, fontsize=8)
            figure.legend(handles=handles, loc="outside upper center", ncols=3)
        except BaseException:
            plt.close(figure)
            raise
    return figure
