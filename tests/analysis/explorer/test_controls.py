"""Sliders say what perturbations declare, and whatever they are set to can be measured."""

import pytest

from analysis.explorer.controls import controls, perturbation_of
from analysis.perturb import PERTURBATIONS, DropTop, Identity, ResidualNoise
from cartmoe.hooks import RouterSite

SITES = [RouterSite("a", 0, 0, 16, 2), RouterSite("b", 1, 0, 6, 2)]
BY_NAME = {control.name: control for control in controls(SITES)}
# They need another run, other perturbations or a function; or do nothing.
NOT_OFFERED = {"Replay", "GateSwap", "Compose", "Custom", "Identity"}


def test_all_are_offered_that_a_number_makes():
    assert [*BY_NAME] == [name for name in PERTURBATIONS if name not in NOT_OFFERED]


@pytest.mark.parametrize(
    ("name", "parameter", "strengths", "start", "neutral"),
    [
        ("DropTop", "m", (0, 1, 2, 3, 4, 5, 6), 1, 0),  # as many as the smaller router has
        ("TopK", "k", (1, 2, 3, 4, 5, 6), 1, None),
        ("SwapRanks", "s", (1, 2, 3, 4, 5, 6), 2, None),
        ("KeepRanks", "ranks", (1, 2, 3, 4, 5, 6), 1, None),
        ("Lag", "n", (0, 1, 2, 3, 4, 5, 6, 7, 8), 1, 0),
        ("Quantize", "to", (1, 2, 3, 4, 5, 6, 7, 8), 1, None),
        ("GaussianNoise", "sigma", (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0), 1.0, 0),
        ("NoRouted", None, (0.0, 1.0), 1.0, 0),
        ("ResidualNoise", "m", (0, 1, 2, 3, 4, 5, 6), 1, 0),
    ],
)
def test_what_a_control_is(name, parameter, strengths, start, neutral):
    control = BY_NAME[name]
    assert control[2:] == (parameter, strengths, start, neutral)
    assert control.about
    assert "\n" not in control.about


@pytest.mark.parametrize("control", BY_NAME.values(), ids=BY_NAME)
def test_every_stop_makes_one(control):
    made = [perturbation_of(control.name, strength) for strength in control.strengths]
    assert len(set(made)) == len(made)
    assert {type(p) for p in made} <= {PERTURBATIONS[control.name], Identity}


def test_numbers_of_a_slider_are_those_of_the_field():
    assert perturbation_of("DropTop", 2.0) == DropTop(2)
    assert perturbation_of("ResidualNoise", 2.0) == ResidualNoise(DropTop(2))
    with pytest.raises(ValueError, match="m is -1; it must be at least 0"):
        perturbation_of("DropTop", -1.0)
    with pytest.raises(ValueError, match=r"m is 1.5; it must be a whole number"):
        perturbation_of("DropTop", 1.5)
