"""Perturb routing, measure the damage and what experts share, draw both.

import analysis as an
model = an.load("runs/quick/models/cartesian-s0")
docs = an.documents("stdlib", model, length=256, limit=100)
results = an.sweep(model, docs, [an.DropTop(m) for m in range(1, 5)])
an.plots.damage_curve(results, "DropTop")
"""

import cartmoe  # noqa: F401  first: it says how threads wait, before torch loads
from analysis import plots, stats
from analysis.conditions import Condition, Where
from analysis.intervene import calibrate, perturbed
from analysis.models import adapt, documents, load
from analysis.perturb import (
    PERTURBATIONS,
    DropChosen,
    DropTop,
    DropUnchosen,
    GaussianNoise,
    Identity,
    NoRouted,
    Perturbation,
    RandomRouting,
)
from analysis.results import Results
from analysis.run import read, run
from analysis.study import Study
from analysis.sweep import sweep

__all__ = [
    "PERTURBATIONS",
    "Condition",
    "DropChosen",
    "DropTop",
    "DropUnchosen",
    "GaussianNoise",
    "Identity",
    "NoRouted",
    "Perturbation",
    "RandomRouting",
    "Results",
    "Study",
    "Where",
    "adapt",
    "calibrate",
    "documents",
    "load",
    "perturbed",
    "plots",
    "read",
    "run",
    "stats",
    "sweep",
]
