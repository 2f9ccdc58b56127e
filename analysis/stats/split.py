"""Damage divided into three parts of a changed decision: which experts, how weighted, how much.

set      which experts are used
weights  how the routed weight is divided among them
mass     the sum of the routed weights

Each coalition of parts is let through as a condition of its own (effect "part set+mass", ...), so
their damages v(S) are measured, and nothing about them is assumed to add up.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.pairs import PLAIN, Losses, Pairs
from analysis.stats.parts import COLUMNS, Parts, choose, combine, stack

PARTS = ("set", "weights", "mass")
# Every coalition but the empty one, which is the clean run, and the effect that lets it through.
COALITIONS = {
    some: "full" if len(some) == len(PARTS) else f"part {'+'.join(some)}"
    for size in range(1, len(PARTS) + 1)
    for some in combinations(PARTS, size)
}


def _shapley(part: str) -> dict[tuple[str, ...], float]:
    """Factors of the v(S) in a part's Shapley value: its gain, averaged over the orders in which
    the parts may join (Shapley 1953)."""
    factors = {}
    for some in COALITIONS:
        others = len(some) - (part in some)  # that were there before it
        weight = 1 / (len(PARTS) * comb(len(PARTS) - 1, others))
        factors[some] = weight if part in some else -weight
    return factors


FACTORS: dict[str, dict[tuple[str, ...], float]] = {
    **{part: _shapley(part) for part in PARTS},
    "full": {PARTS: 1.0},
    **{f"{part} alone": {(part,): 1.0} for part in PARTS},
    "interaction": {PARTS: 1.0} | {(part,): -1.0 for part in PARTS},
}


def split(
    losses: Losses, condition: str | None = None, bootstrap: Bootstrap = Bootstrap()
) -> pd.DataFrame:
    """Damage of a condition (a label such as "DropTop(1)"; None: all that can be) divided.

    A table of parts (see parts.py), for each checkpoint that has all of `analysis.split_arms`:

    set, weights, mass          Shapley values: they add up to the damage of the whole condition
    full                        that damage
    set alone, ...              main effects: damage where only this part is let through
    interaction                 full minus the three main effects

    Raises `ValueError` naming what a condition lacks.
    """

    def parts_of(p: Pairs, name: str) -> Parts:
        if p.variant(name, effect=PLAIN["effect"]) != name:
            return {}
        label = {some: p.variant(name, effect=effect) for some, effect in COALITIONS.items()}
        return {
            part: {label[some]: factor for some, factor in factors.items()}
            for part, factors in FACTORS.items()
        }

    how = "the conditions of analysis.split_arms(perturbation)"
    chosen = choose(losses, condition, parts_of, how)
    return stack(combine(*one, "full", bootstrap) for one in chosen)[COLUMNS]
