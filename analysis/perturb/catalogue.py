"""Every perturbation by its name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from analysis.perturb.base import Identity, Perturbation, import_name
from analysis.perturb.compound import Compose, Custom, ResidualNoise
from analysis.perturb.decisions import DropSlots, Lag, NoRouted, TopK, UniformWeights
from analysis.perturb.flips import Worst
from analysis.perturb.gates import GateSwap
from analysis.perturb.logits import (
    GaussianNoise,
    GumbelNoise,
    Quantize,
    RandomRouting,
    SwapRanks,
    Temperature,
)
from analysis.perturb.masks import DropChosen, DropExperts, DropTop, DropUnchosen, KeepRanks
from analysis.perturb.recorded import Replay
from cartmoe.config import check_choice

PERTURBATIONS: dict[str, type[Perturbation]] = {
    "Identity": Identity,
    "DropTop": DropTop,
    "KeepRanks": KeepRanks,
    "TopK": TopK,
    "DropExperts": DropExperts,
    "DropSlots": DropSlots,
    "DropChosen": DropChosen,
    "DropUnchosen": DropUnchosen,
    "GaussianNoise": GaussianNoise,
    "GumbelNoise": GumbelNoise,
    "Temperature": Temperature,
    "SwapRanks": SwapRanks,
    "RandomRouting": RandomRouting,
    "UniformWeights": UniformWeights,
    "Quantize": Quantize,
    "Lag": Lag,
    "Replay": Replay,
    "GateSwap": GateSwap,
    "Worst": Worst,
    "Compose": Compose,
    "ResidualNoise": ResidualNoise,
    "NoRouted": NoRouted,
    "Custom": Custom,
}


def perturbation_class(name: Any) -> type[Perturbation]:
    """The class of that name: of the catalogue, or "package.module:Name" of one's own.

    Raises `ValueError` with the choices.
    """
    if isinstance(name, str) and ":" in name:
        cls = import_name(name)
        if not isinstance(cls, type) or not issubclass(cls, Perturbation):
            raise ValueError(f"{name!r} is no class derived from analysis.Perturbation")
        return cls
    check_choice("perturbation", name, PERTURBATIONS)
    return PERTURBATIONS[name]


def perturbation_from_dict(d: dict[str, Any]) -> Perturbation:
    """The inverse of `Perturbation.to_dict`; `ValueError` with the choices for a wrong name."""
    parameters = {name: _parsed(value) for name, value in d.items()}
    cls = perturbation_class(parameters.pop("name", None))
    parameters.pop("source", None)  # in the identity of one's own classes
    for parameter in parameters:
        check_choice(f"parameter of {cls.__name__}", parameter, [f.name for f in fields(cls)])
    return cls(**parameters)


def _parsed(value: Any) -> Any:
    """With perturbations in the place of their dicts."""
    if isinstance(value, list | tuple):
        return [_parsed(item) for item in value]
    return perturbation_from_dict(value) if isinstance(value, dict) and "name" in value else value
