"""What a change does where it is made, and what it does through the routers behind it."""

from __future__ import annotations

import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.pairs import PLAIN, Losses, Pairs, of_checkpoint, pair
from analysis.stats.parts import COLUMNS, Parts, choose, combine, stack, with_doses


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
    places = {
        p.name: _in_order(
            sites_in(p.conditions["where"])
            if routing is None
            else of_checkpoint(routing, p.checkpoint)
        )
        for p in pairs
    }

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


def _in_order(sites: pd.DataFrame) -> list[str]:
    """As `where` names them."""
    ordered = sites[["layer", "stage"]].drop_duplicates().sort_values(["layer", "stage"])
    return [f"layer {layer} stage {stage}" for layer, stage in ordered.itertuples(index=False)]
