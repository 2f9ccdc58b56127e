"""The robustness gap: the worst flips that a search found against as many random ones."""

from __future__ import annotations

import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.doses import doses
from analysis.stats.pairs import CHECKPOINT, CONDITION, Losses, Pairs, label, pair
from analysis.stats.parts import choose, combine, stack

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

    and budget (n). With `routing` also flips, the share of the chosen experts that each changed
    (the worst may leave a part of its budget); with `cells` price, seconds of a condition's cells
    per second of the clean run's. Raises `ValueError` naming what a condition lacks.
    """
    tables = []
    how = 'Worst(n, choose="random") beside Worst(n)'
    for p, name in choose(pair(losses), condition, _needs, how):
        _, random = _needs(p, name)
        parts = {"worst": {name: 1.0}, "random": {random: 1.0}, "gap": {name: 1.0, random: -1.0}}
        table = combine(p, name, parts, "worst", bootstrap)
        rows = p.conditions.set_index("label")
        table["budget"] = rows.strength[name]
        table["label"] = [name, random, None]
        if cells is not None:
            table["price"] = [
                *(_price(cells, p, rows.ids[label]) for label in (name, random)),
                None,
            ]
        tables.append(table)
    table = stack(tables)
    if routing is not None and len(table):
        dose = doses(routing)
        dose = dose.assign(label=label(dose))[[*CHECKPOINT, "label", "flips"]]
        table = table.merge(dose, on=[*CHECKPOINT, "label"], how="left")
    return table.drop(columns="label", errors="ignore")


def _needs(p: Pairs, name: str) -> list[str]:
    """The label itself and that of its random flips; empty for what is no Worst."""
    row = p.by_label[name]
    if row["perturbation"].partition("(")[0] != "Worst" or RANDOM in row["perturbation"]:
        return []

    def partner(other: dict[str, object]) -> bool:
        same = [column for column in CONDITION if column != "perturbation"]
        kind = _kind(row["perturbation"]) | {RANDOM}
        return _kind(other["perturbation"]) == kind and all(row[c] == other[c] for c in same)

    found = [label for label, other in p.by_label.items() if partner(other)]
    return [name, *(found[:1] or [f"{name}, {RANDOM}"])]


def _kind(perturbation: str) -> frozenset[str]:
    """Name and options, less the rounds: random flips are made in one."""
    words = perturbation.rstrip(")").replace("(", ", ").split(", ")
    return frozenset(word for word in words if not word.startswith("rounds="))


def _price(cells: pd.DataFrame, p: Pairs, ids: tuple[str, ...]) -> float:
    """Seconds a shard of these conditions' cells, over those of the clean run's."""
    mine = cells[
        (cells.model == p.checkpoint["model"]) & (cells.train_seed == p.checkpoint["train_seed"])
    ]
    seconds = mine.groupby("condition").seconds.mean()
    return seconds.reindex(list(ids)).mean() / seconds.get("clean", float("nan"))
