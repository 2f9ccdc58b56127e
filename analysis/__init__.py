"""Perturb routing, measure the damage and what experts share, draw both.

import analysis as an
model = an.load("runs/quick/models/cartesian-s0")
docs = an.documents("stdlib", model, length=256, limit=100)
results = an.sweep(model, docs, [an.DropTop(m) for m in range(1, 5)])
an.plots.damage_curve(results, "DropTop")
"""

import cartmoe  # noqa: F401  first: it says how threads wait, before torch loads
from analysis import plots, stats
from analysis.arms import cascade_arms, site_arms, split_arms
from analysis.compare import compare
from analysis.comparison import Comparison
from analysis.conditions import Condition, Where
from analysis.executors import dask, processes
from analysis.export import export
from analysis.generate import generation_agreement
from analysis.intervene import calibrate, perturbed
from analysis.margins import flip_prediction
from analysis.measure_overlap import measure_overlap
from analysis.models import adapt, documents, load
from analysis.overlap import METRICS, Overlap
from analysis.perturb import (
    PERTURBATIONS,
    Compose,
    Custom,
    DropChosen,
    DropExperts,
    DropSlots,
    DropTop,
    DropUnchosen,
    GateSwap,
    GaussianNoise,
    GumbelNoise,
    Identity,
    KeepRanks,
    Lag,
    NoRouted,
    Perturbation,
    Quantize,
    RandomRouting,
    Replay,
    ResidualNoise,
    SwapRanks,
    Temperature,
    TopK,
    UniformWeights,
    Worst,
)
from analysis.regret import regret
from analysis.relation import Relation, relate
from analysis.removal import expert_damage, takeover
from analysis.results import Results
from analysis.run import read, run
from analysis.study import Study
from analysis.substitute import calibration, substitution
from analysis.sweep import sweep
from analysis.trace import Trace
from analysis.training import Training, over_training, saturation
from analysis.truth import factor_information, truth_scores

__all__ = [
    "METRICS",
    "PERTURBATIONS",
    "Comparison",
    "Compose",
    "Condition",
    "Custom",
    "DropChosen",
    "DropExperts",
    "DropSlots",
    "DropTop",
    "DropUnchosen",
    "GateSwap",
    "GaussianNoise",
    "GumbelNoise",
    "Identity",
    "KeepRanks",
    "Lag",
    "NoRouted",
    "Overlap",
    "Perturbation",
    "Quantize",
    "RandomRouting",
    "Relation",
    "Replay",
    "ResidualNoise",
    "Results",
    "Study",
    "SwapRanks",
    "Temperature",
    "TopK",
    "Trace",
    "Training",
    "UniformWeights",
    "Where",
    "Worst",
    "adapt",
    "calibrate",
    "calibration",
    "cascade_arms",
    "compare",
    "dask",
    "documents",
    "expert_damage",
    "export",
    "factor_information",
    "flip_prediction",
    "generation_agreement",
    "load",
    "measure_overlap",
    "over_training",
    "perturbed",
    "plots",
    "processes",
    "read",
    "regret",
    "relate",
    "run",
    "saturation",
    "site_arms",
    "split_arms",
    "stats",
    "substitution",
    "sweep",
    "takeover",
    "truth_scores",
]
