"""What a study found, in sentences that are made from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb

import pandas as pd

from analysis import stats
from analysis.measure import Results
from analysis.report.text import NOT_OF_SEEDS, whole_conditions
from analysis.report.verdicts import positive_control
from analysis.stats import CHECKPOINT

# What is there to give others their meaning, and would be the ends of every list.
CONTROLS = ("DropChosen", "DropUnchosen", "RandomRouting", "NoRouted", "ResidualNoise")
FEWEST = 3  # training seeds of each of two models, below which families are not ordered


def summary(
    results: Results, made: Mapping[str, pd.DataFrame], margin: float | None = None
) -> list[str]:
    """What is said of all models; `made` are the tables of `analysis.report.text.tables`, margin
    that of the contrasts. `ends` says what there is of each."""
    if not results.has_conditions:
        return ["Nothing but clean runs was measured.", f"{NOT_OF_SEEDS}."]
    damage = made["damage"]
    return [
        *_span("Disabling each token’s first choice", damage, "DropTop(1)"),
        *_span("Random routing", damage, "RandomRouting"),
        f"{positive_control(damage)}.",
        *contrasts_text(made.get("contrasts"), margin),
        seeds_allow(results),
        f"{NOT_OF_SEEDS}.",
    ]


def _span(said: str, damage: pd.DataFrame, name: str) -> list[str]:
    """Between what a condition costs these checkpoints, if it was measured."""
    found = pd.concat([stats.find(rows, name).tail(1) for _, rows in damage.groupby(CHECKPOINT)])
    found = found[found.delta_nats.notna()].sort_values("delta_nats")
    if found.empty:
        return []
    texts = stats.interval_texts(found, "delta_nats", "low", "high", digits=2)
    between = f"between {texts[0]} and {texts[-1]}" if len(texts) > 1 else texts[0]
    checkpoints = f"these {len(texts)} checkpoints" if len(texts) > 1 else "this checkpoint"
    return [f"{said} costs {checkpoints} {between} nats per token."]


def ends(damage: pd.DataFrame) -> list[str]:
    """Of each checkpoint the condition that costs most and the one that costs least, among those
    that act everywhere and are no controls (nats per token)."""
    known = damage[damage.label.isin(whole_conditions(damage)) & damage.delta_nats.notna()]
    known = known[~known["name"].isin(CONTROLS)]
    said = []
    for (model, seed), rows in known.groupby(["model", "train_seed"], sort=False):
        most, least = _costs(rows.loc[[rows.delta_nats.idxmax(), rows.delta_nats.idxmin()]])
        text = f"most under {most}; least under {least}" if len(rows) > 1 else f"under {most}"
        said.append(f"{model} (seed {seed}): {text}.")
    return said


def _costs(rows: pd.DataFrame) -> list[str]:
    texts = stats.interval_texts(rows, "delta_nats", "low", "high", digits=2)
    return [f"{label}, {text}" for label, text in zip(rows.label, texts, strict=True)]


def contrasts_text(table: pd.DataFrame | None, margin: float | None) -> list[str]:
    """How the contrasts came out."""
    if table is None:
        return ["No contrast was named beforehand, so none is tested."]
    reference = table.reference.iloc[0]
    bar = f", margin {margin:g} nats per token" if margin else ""
    head = f"Contrasts named beforehand ({reference} less each other model{bar}), of {len(table)}"
    found = {
        verdict: ", ".join(rows.model + " under " + rows.condition)
        for verdict, rows in table.groupby("verdict", sort=False)
    }
    each = "; ".join(f"{verdict}: {names}" for verdict, names in found.items())
    return [f"{head}: {each}."]


def seeds_allow(results: Results) -> str:
    """The smallest p that the numbers of training seeds allow, and whether families are ordered."""
    seeds = results.losses.groupby("model").train_seed.nunique()
    if len(seeds) < 2:
        return "One model was measured, so models are not compared."
    a, b = max(combinations(seeds, 2), key=lambda pair: comb(sum(pair), pair[0]))
    least = min(1.0, 2 / comb(a + b, a))
    said = (
        f"No two models have more than {a} and {b} training seeds: the smallest p that a "
        f"permutation test over seeds allows is {least:.2g}."
    )
    few = " Families are not ordered: that needs at least three training seeds of each."
    return said + (few if seeds.min() < FEWEST else "")
