"""What a change does where it is made, and what it does through the routers behind it."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.doses import doses
from analysis.stats.pairs import CHECKPOINT, PLAIN, Losses, Pairs, label, pair
from analysis.stats.parts import choose, combine, stack

SITE = r"layer (\d+) stage (\d+)"


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

    def needs(p: Pairs, name: str) -> list[str]:
        rerouted = p.variant(name, downstream=PLAIN["downstream"]) == name
        return [name, p.variant(name, downstream="replay")] if rerouted else []

    tables = []
    for p, name in choose(
        pair(losses), condition, needs, "the conditions of analysis.cascade_arms(perturbation)"
    ):
        _, replay = needs(p, name)
        parts = {"reroute": {name: 1.0}, "replay": {replay: 1.0}}
        parts["cascade"] = {name: 1.0, replay: -1.0}
        table = combine(p, name, parts, "reroute", bootstrap)
        tables.append(table.assign(label=[name, replay, None]))
    table = stack(tables)
    if routing is not None and len(table):
        dose = doses(routing)
        dose = dose.assign(label=label(dose))[[*CHECKPOINT, "label", "flips", "flips_total"]]
        table = table.merge(dose, on=[*CHECKPOINT, "label"], how="left")
    return table.drop(columns="label", errors="ignore")


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
    there = {} if routing is None else {p.name: _sites_of(routing, p) for p in pairs}

    def sites(p: Pairs, name: str) -> list[str]:
        """The sites where the condition was measured alone, or of `routing` all."""
        if p.variant(name, where=PLAIN["where"]) != name:
            return []
        if routing is not None:
            return there[p.name]
        own = p.conditions[p.conditions["where"].str.fullmatch(SITE)]
        places = [w for w in own["where"].unique() if p.variant(name, where=w) in set(own.label)]
        return sorted(places, key=_place)

    def needs(p: Pairs, name: str) -> list[str]:
        alone = [p.variant(name, where=where) for where in sites(p, name)]
        return [name, *alone] if alone else []

    tables = []
    for p, name in choose(
        pairs, condition, needs, "the conditions of analysis.site_arms(model, perturbation)"
    ):
        parts = {where: {p.variant(name, where=where): 1.0} for where in sites(p, name)}
        parts["sum"] = {site: 1.0 for part in parts.values() for site in part}
        parts["joint"] = {name: 1.0}
        parts["joint - sum"] = parts["joint"] | dict.fromkeys(parts["sum"], -1.0)
        tables.append(combine(p, name, parts, "joint", bootstrap))
    return stack(tables)


def _place(where: str) -> tuple[int, ...]:
    return tuple(int(word) for word in where.split() if word.isdigit())


def _sites_of(routing: pd.DataFrame, p: Pairs) -> list[str]:
    same = [routing[name] == value for name, value in p.checkpoint.items()]
    places = routing[np.logical_and.reduce(same)][["layer", "stage"]].drop_duplicates()
    ordered = places.sort_values(["layer", "stage"]).itertuples(index=False)
    return [f"layer {layer} stage {stage}" for layer, stage in ordered]
