"""The robustness gap: the worst flips that a search found against as many random ones."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.pairs import Losses, Pairs, of_checkpoint
from analysis.stats.parts import Parts, choose, combine, stack, with_doses

RANDOM = "choose=random"


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
    random = found[0] if found else f"{name}, {RANDOM}"
    return {"worst": {name: 1.0}, "random": {random: 1.0}, "gap": {name: 1.0, random: -1.0}}


def _price(seconds: pd.Series, ids: tuple[str, ...]) -> float:
    """Seconds a shard of these conditions' cells, over those of the clean run's."""
    return seconds.reindex(list(ids)).mean() / seconds.get("clean", float("nan"))
