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

Of what experts have in common:

sites.py           rows of one metric, one site; matrices.py: experts by experts as an image
heatmaps.py        a metric of pairs beside its null
profiles.py        a metric over the depth
domains.py         experts by domains
cartesian.py       the two stages of a Cartesian layer
substitution.py    one expert in another's place, estimated and measured
overlap_damage.py  damage of single experts against their overlap
relation.py        how far the two go together
saturation.py      when routing settles in training

Each function of damage takes the frame of the function of `stats` that it names, or any object with
a method of that name, such as a Results; each of overlap a table, or any object that has it as an
attribute, such as an Overlap.
"""

from analysis.plots.cartesian import cartesian_usage
from analysis.plots.cascades import cascade_dots
from analysis.plots.catalogue import catalogue_dots
from analysis.plots.controls import control_dots
from analysis.plots.curves import damage_curve
from analysis.plots.domains import specialization
from analysis.plots.gaps import gap_curve
from analysis.plots.groups import group_curve
from analysis.plots.heatmaps import overlap_heatmap
from analysis.plots.layers import layer_profile
from analysis.plots.margins import flip_calibration
from analysis.plots.overlap_damage import damage_against_overlap
from analysis.plots.panels import dose_panels
from analysis.plots.profiles import overlap_profile
from analysis.plots.relation import relation_dots
from analysis.plots.saturation import saturation_curve
from analysis.plots.splits import split_bars
from analysis.plots.stages import stage_dots
from analysis.plots.style import paper_style, save
from analysis.plots.substitution import substitution_matrix
from analysis.plots.tails import tail_shares

__all__ = [
    "cartesian_usage",
    "cascade_dots",
    "catalogue_dots",
    "control_dots",
    "damage_against_overlap",
    "damage_curve",
    "dose_panels",
    "flip_calibration",
    "gap_curve",
    "group_curve",
    "layer_profile",
    "overlap_heatmap",
    "overlap_profile",
    "paper_style",
    "relation_dots",
    "saturation_curve",
    "save",
    "specialization",
    "split_bars",
    "stage_dots",
    "substitution_matrix",
    "tail_shares",
]
