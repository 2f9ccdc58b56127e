"""Damage taken apart: tables of parts (see parts.py), each measured as a condition of its own.

split        which experts are used (set), how the routed weight is divided among them (weights) and
             the sum of the routed weights (mass)
cascade      what a change does where it is made, and through the routers behind it
additivity   single sites against all of them
gap          the worst flips that a search found against as many random ones
"""

from __future__ import annotations

import json
from itertools import combinations
from math import comb
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import PLAIN, of_checkpoint
from analysis.stats.pairs import Losses, Pairs, pair
from analysis.stats.parts import COLUMNS, Parts, choose, combine, stack, with_doses

PARTS = ("set", "weights", "mass")
# Every coalition but the empty one, which is the clean run, and the effect that lets it through.
# Their damages v(S) are measured, and nothing about them is assumed to add up.
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


def cascade(
    losses: Losses,
    condition: str | None = None,
    routing: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage of a condition (a label; None: all that can be) with and without the cascade.

    A table of parts (see parts.py), for each checkpoint that has `analysis.cascade_arms`:

    reroute    damage where every router works from the stream that reaches it
    replay     damage where every router repeats the clean run's logits: no cascade of decisions
    cascade    reroute minus replay

    With `routing` also flips, against each router's own decision on its input (direct), and
    flips_total, against the clean run's decision: their difference is what the cascade moved.
    Raises `ValueError` naming what a condition lacks.
    """

    def parts_of(p: Pairs, name: str) -> Parts:
        if p.variant(name, downstream=PLAIN["downstream"]) != name:
            return {}
        replay = p.variant(name, downstream="replay")
        cascade = {name: 1.0, replay: -1.0}
        return {"reroute": {name: 1.0}, "replay": {replay: 1.0}, "cascade": cascade}

    how = "the conditions of analysis.cascade_arms(perturbation)"
    chosen = choose(losses, condition, parts_of, how)
    table = stack(combine(*one, "reroute", bootstrap) for one in chosen)
    return with_doses(table, routing, "flips", "flips_total")


def additivity(
    losses: Losses,
    condition: str | None = None,
    routing: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damages at each site alone, their sum, and the damage at all sites at once.

    condition   the label of the joint condition ("DropTop(1)"; None: all that can be)

    A table of parts (see parts.py), for each checkpoint that has `analysis.site_arms`:

    layer 0 stage 0, ...    the condition at this site alone, in the order of the model
    sum                     of these
    joint                   at all sites at once
    joint - sum             above 0: together the sites do more than each adds alone

    `routing`, where it is given, says which sites there are: a checkpoint that lacks one is left
    out. Raises `ValueError` naming what a condition lacks.
    """
    pairs = pair(losses)
    places = {p.name: _sites_of(p, routing) for p in pairs}

    def parts_of(p: Pairs, name: str) -> Parts:
        if p.variant(name, where=PLAIN["where"]) != name:
            return {}
        alone = {where: p.variant(name, where=where) for where in places[p.name]}
        if routing is None:  # those where it was measured
            alone = {where: label for where, label in alone.items() if label in p.by_label}
        if not alone:
            return {}
        total = dict.fromkeys(alone.values(), 1.0)
        difference = {name: 1.0} | dict.fromkeys(total, -1.0)
        parts = {where: {label: 1.0} for where, label in alone.items()}
        return parts | {"sum": total, "joint": {name: 1.0}, "joint - sum": difference}

    how = "the conditions of analysis.site_arms(model, perturbation)"
    chosen = choose(pairs, condition, parts_of, how)
    return stack(combine(*one, "joint", bootstrap) for one in chosen)[COLUMNS]


def sites_in(where: pd.Series) -> pd.DataFrame:
    """layer and stage of those that are one site, "layer 2 stage 1"."""
    return where.str.extract(r"^layer (?P<layer>\d+) stage (?P<stage>\d+)$").dropna().astype(int)


def _sites_of(p: Pairs, routing: pd.DataFrame | None) -> list[str]:
    """Of routing, or those where a condition was measured alone, in order, as `where` has them."""
    sites = sites_in(p.conditions["where"])
    if routing is not None:
        sites = of_checkpoint(routing, p.checkpoint)
    ordered = sites[["layer", "stage"]].drop_duplicates().sort_values(["layer", "stage"])
    return [f"layer {layer} stage {stage}" for layer, stage in ordered.itertuples(index=False)]


def gap(
    losses: Losses,
    condition: str | None = None,
    routing: pd.DataFrame | None = None,
    cells: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage of Worst (a label such as "Worst(1)"; None: all there are) against random flips.

    A table of parts (see parts.py), for each checkpoint that has Worst(n) and
    Worst(n, choose="random") with the same `per`, at the same place:

    worst, random    their damages
    gap              worst minus random

    and budget (n) and per ("token" or "sequence"). With `routing` also flips, the share of the
    chosen experts that each changed (the worst may leave a part of its budget); with `cells` price,
    seconds of a condition's cells per second of the clean run's. Raises `ValueError` naming what a
    condition lacks.
    """
    tables = []
    how = 'Worst(n, choose="random") beside Worst(n)'
    for p, name, parts in choose(losses, condition, _parts, how):
        table = combine(p, name, parts, "worst", bootstrap)
        worst = p.by_label[name]
        table = table.assign(budget=worst["strength"], per=json.loads(worst["parameters"])["per"])
        if cells is not None:
            seconds = of_checkpoint(cells, p.checkpoint).groupby("condition").seconds.mean()
            ids = p.conditions.set_index("label").ids
            prices = [_price(seconds, ids[label]) for label in (*parts["worst"], *parts["random"])]
            table["price"] = [*prices, None]
        tables.append(table)
    return with_doses(stack(tables), routing, "flips")


def _parts(p: Pairs, name: str) -> Parts:
    """Empty for what is no Worst."""
    row = p.by_label[name]
    options = json.loads(row["parameters"])
    if row["name"] != "Worst" or options["choose"] == "random":
        return {}

    def kind(other: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        # Random flips are made in one round.
        return {**other, "perturbation": None, "parameters": {**options, "rounds": None}}

    wanted = kind(row, options | {"choose": "random"})
    known = p.by_label.items()
    found = [label for label, o in known if kind(o, json.loads(o["parameters"])) == wanted]
    random = found[0] if found else f"{name}, choose=random"
    return {"worst": {name: 1.0}, "random": {random: 1.0}, "gap": {name: 1.0, random: -1.0}}


def _price(seconds: pd.Series, ids: tuple[str, ...]) -> float:
    """Seconds a shard of these conditions' cells, over those of the clean run's."""
    return seconds.reindex(list(ids)).mean() / seconds.get("clean", float("nan"))
