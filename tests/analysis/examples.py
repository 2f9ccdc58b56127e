"""Examples of every perturbation of the catalogue."""

import math

import pytest

from analysis.perturb.base import Identity
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.flips import Worst
from analysis.perturb.logits import (
    GaussianNoise,
    GumbelNoise,
    Quantize,
    RandomRouting,
    SwapRanks,
    Temperature,
)
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen, KeepRanks


def soften(logits_TE, ctx):
    return logits_TE * 0.5


OWN_EXAMPLES = {"Replay", "GateSwap"}  # need another run: elsewhere
# Of every perturbation that is a map of logits or of a decision.
EXAMPLES: dict[str, list] = {
    "Identity": [Identity()],
    "DropTop": [DropTop(), DropTop(2), DropTop(ratio=0.5)],
    "KeepRanks": [KeepRanks((2,)), KeepRanks((1, 3, 4))],
    "TopK": [TopK(1), TopK(5)],
    "DropExperts": [
        DropExperts(0.5),
        DropExperts(0.5, "most_used"),
        DropExperts(0.5, "least_used"),
        DropExperts(ids=[0, 2, 3]),
        DropExperts(ids={"layer 0": [1], "layer 2": [0, 2], "layer 2 stage 0": [4]}),
    ],
    "DropSlots": [DropSlots(), DropSlots(0.3, renormalize=True)],
    "DropChosen": [DropChosen(), DropChosen(2)],
    "DropUnchosen": [DropUnchosen(), DropUnchosen(3)],
    "GaussianNoise": [
        GaussianNoise(2.0),
        GaussianNoise(3.0, scale="site"),
        GaussianNoise(4.0, scale="absolute", within="chosen"),
        GaussianNoise(1000.0, scale="absolute"),
    ],
    "GumbelNoise": [GumbelNoise(2.0)],
    "Temperature": [Temperature(), Temperature(-2.0)],
    "SwapRanks": [SwapRanks(), SwapRanks(1, 5)],
    "RandomRouting": [RandomRouting(), RandomRouting(0.5), RandomRouting(draw="permute")],
    "UniformWeights": [UniformWeights(), UniformWeights(0.5)],
    "Quantize": [Quantize(), Quantize("fp8"), Quantize(2)],
    "Lag": [Lag(), Lag(3), Lag(over="sites")],
    "Compose": [
        Compose((DropTop(1), GaussianNoise(1.0), DropSlots(0.2))),
        Compose((Compose((DropTop(1), Temperature())), UniformWeights())),
    ],
    "NoRouted": [NoRouted()],
    "Custom": [Custom(soften, title="soften")],
}
# Of those that need a whole model, or its output: through `measure`.
MEASURED: dict[str, list] = {
    "Worst": [Worst(), Worst(3, per="sequence", rounds=2), Worst(2, choose="random")],
    "ResidualNoise": [ResidualNoise(), ResidualNoise(GaussianNoise(2.0, scale="site"))],
}
ALL = [p for examples in (*EXAMPLES.values(), *MEASURED.values()) for p in examples]


def name_of(p) -> str:
    """The same in every process."""
    return p.label if math.isnan(p.strength) else f"{p.label} {p.strength:g}"


NUMBER = sum(map(len, EXAMPLES.values()))
EACH = pytest.mark.parametrize("p", ALL[:NUMBER], ids=name_of)
EACH_MEASURED = pytest.mark.parametrize("p", ALL[NUMBER:], ids=name_of)
EVERY = pytest.mark.parametrize("p", ALL, ids=name_of)
