"""Perturb routing, measure the damage and what experts share, draw both.

import analysis as an
model = an.load("cartesian")
docs = an.documents("stdlib", model, length=256, limit=100)
results = an.sweep(model, docs, [an.DropTop(m) for m in range(1, 5)])
an.plots.damage_curve(results, "DropTop")

The names stand in __init__.pyi; what is behind one is imported when it is first used.
"""

import lazy_loader

import cartmoe  # first: it says how threads wait, before torch loads

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
