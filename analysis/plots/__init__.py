"""Tables of damage in, axes out: pictures of one kind in a file, no statistics.

style.py      column width, fonts, one color and one marker a family; saving.py: as files
marks.py      lines with intervals, means of seeds, notes, rows
names.py      names at the ends of lines, legends; scales.py: axes of change
dots.py       rows of estimates with intervals
conditions.py every condition, a row each; top-1 disabled beside its controls, and at each stage
curves.py     damage against dose, or several doses; the worst flips against random ones
apart.py      damage divided into set, weights and mass; with and without the routers behind
along.py      along the depth: damage, or a metric of overlap; by position, frequency, domain of
              tokens; what the worst of them carry
routing.py    routing by itself: when it settles in training, flips that margins predict

Of what experts have in common:

rows.py       rows of one metric, one site; matrices.py: experts by experts as an image
heatmaps.py   a metric of pairs beside its null; experts by domains; one in another's place
cartesian.py  the two stages of a Cartesian layer
relation.py   damage of experts against it, and how far the two go together

Each function of damage takes the frame of the function of `stats` that it names, or any object with
a method of that name, such as a Results; each of overlap a table, or any object that has it as an
attribute, such as an Overlap.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
