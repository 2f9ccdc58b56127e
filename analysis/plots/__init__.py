"""Tables of damage in, axes out: one file a picture, no statistics.

style.py      column width, fonts, one colour and one marker a family, saving
dots.py       rows of estimates with intervals
catalogue.py  every condition, a row each
curves.py     damage against dose; panels.py: against several doses
controls.py   top-1 disabled beside its controls
stages.py     all stages and each alone, at both mask points
splits.py     damage divided into set, weights and mass
cascades.py   with and without the routers behind
margins.py    flips that margins predict, against those that noise made
layers.py     over the depth, each site alone against all at once
gaps.py       the worst flips against random ones
tails.py      what the worst tokens carry
groups.py     by position, frequency, domain

Each function takes the frame of the function of `stats` that it names, or any object with a
method of that name, such as a Results.
"""

from analysis.plots.cascades import cascade_dots
from analysis.plots.catalogue import catalogue_dots
from analysis.plots.controls import control_dots
from analysis.plots.curves import damage_curve
from analysis.plots.gaps import gap_curve
from analysis.plots.groups import group_curve
from analysis.plots.layers import layer_profile
from analysis.plots.margins import flip_calibration
from analysis.plots.panels import dose_panels
from analysis.plots.splits import split_bars
from analysis.plots.stages import stage_dots
from analysis.plots.style import paper_style, save
from analysis.plots.tails import tail_shares

__all__ = [
    "cascade_dots",
    "catalogue_dots",
    "control_dots",
    "damage_curve",
    "dose_panels",
    "flip_calibration",
    "gap_curve",
    "group_curve",
    "layer_profile",
    "paper_style",
    "save",
    "split_bars",
    "stage_dots",
    "tail_shares",
]
