"""Tables of damage in, axes out: one file a picture, no statistics.

style.py      column width, fonts, one colour and one marker a family, saving
curves.py     damage against dose
controls.py   top-1 disabled beside its controls
stages.py     all stages and each alone, at both mask points

Each function takes the frame of `stats.damage`, or any object whose damage() gives it.
"""

from analysis.plots.controls import control_dots
from analysis.plots.curves import damage_curve
from analysis.plots.stages import stage_dots
from analysis.plots.style import paper_style, save

__all__ = ["control_dots", "damage_curve", "paper_style", "save", "stage_dots"]
