"""Conditions that belong together, for tables that take a condition's damage apart."""

from __future__ import annotations

from typing import Any

from analysis.adapters import as_adapter
from analysis.perturb.base import Perturbation
from analysis.perturb.condition import DOWNSTREAM, Condition
from analysis.perturb.effects import COALITIONS
from analysis.perturb.where import Where


def split_arms(perturbation: Perturbation, **options: Any) -> list[Condition]:
    """The whole condition and each coalition of its parts, for `Results.split`.

    options   those of `Condition`, other than the effect
    """
    effects = ("full", *COALITIONS)
    return [Condition(perturbation, effect=effect, **options) for effect in effects]


def site_arms(model: object, perturbation: Perturbation, **options: Any) -> list[Condition]:
    """The condition at all sites of the model at once, and at each alone, for
    `Results.additivity`.

    options   those of `Condition`, other than where
    """
    places: list[Any] = ["all", *as_adapter(model).sites()]
    return [Condition(perturbation, Where.parse(place), **options) for place in places]


def cascade_arms(perturbation: Perturbation, **options: Any) -> list[Condition]:
    """The condition with the later routers rerouting and repeating the clean run, for
    `Results.cascade`.

    options   those of `Condition`, other than downstream
    """
    return [Condition(perturbation, downstream=way, **options) for way in DOWNSTREAM]
