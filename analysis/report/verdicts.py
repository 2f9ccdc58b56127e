"""What a study's controls say: whether its numbers mean anything."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from analysis import stats
from analysis.measure import Results

LEAST = 1e-6  # routed weight or output that moved less did not: weights are rounded
SETS = ("full", "selection", "no_refill", "part set")  # effects that let another set through
# What each expectation is measured by; see `Perturbation.expects`.
DOSE = {"selection": "changed", "weights": "mass_moved", "output": "output_change"}


def verdicts(damage: pd.DataFrame) -> list[str]:
    """Of every control, in the order in which they decide."""
    return [*identity_control(damage), positive_control(damage), *without_effect(damage)]


def said(table: pd.DataFrame, texts: Iterable[str]) -> list[str]:
    """For each row, of which model it says that."""
    models = zip(table.model, table.train_seed, texts, strict=True)
    return [f"{model} (seed {seed}): {text}" for model, seed, text in models]


def failed_cells(results: Results) -> list[str]:
    """Cells that killed their workers, each with the reason."""
    failed = results.failed
    if failed.empty:
        return []
    texts = stats.label(failed) + ", shard " + failed.shard.astype(str) + ": " + failed.reason
    title = f"FAILED: {len(failed)} cells killed their workers"
    return ["\n  ".join([title, *said(failed, texts)])]


def identity_control(damage: pd.DataFrame) -> list[str]:
    """The verdict on the hooks themselves: an identity that is not exactly 0 voids the study."""
    identity = damage[damage["name"] == "Identity"]
    if identity.empty:
        return []
    wrong = identity[(identity[["delta_nats", "kl", "mass_moved"]] != 0).any(axis=1)]
    if wrong.empty:
        return ["Identity control: hooks alone change nothing, to the last bit: passed"]
    names = ", ".join(said(wrong, map("{:g}".format, wrong.delta_nats)))
    return [f"Identity control FAILED: hooks alone change the loss of {names}"]


def covered(results: Results) -> list[str]:
    """Of pretrained models, what is seen of their experts."""
    rows = results.models[results.models.coverage != ""]
    return [f"{row.model} (seed {row.train_seed}): {row.coverage}" for row in rows.itertuples()]


def positive_control(damage: pd.DataFrame) -> str:
    """Whether random routing hurts: if not, no condition says anything of routing."""
    if not (damage["name"] == "RandomRouting").any():
        return "Positive control: RandomRouting was not run, so nothing shows that routing matters"
    failed = stats.positive_control(damage)
    number = damage.num_documents.min()
    if number < stats.FEW_DOCUMENTS:
        return (
            f"Positive control: too few documents ({number}; at least {stats.FEW_DOCUMENTS}) to "
            "show that random routing hurts"
        )
    if failed.empty:
        return "Positive control: random routing hurts every model (interval above 0): passed"
    texts = stats.interval_texts(failed, "delta_nats", "low", "high", digits=4)
    names = ", ".join(said(failed, texts))
    return f"Positive control FAILED: random routing is not shown to hurt {names}"


def without_effect(damage: pd.DataFrame) -> list[str]:
    """Conditions that did not change what they are there to change: they failed, and say nothing
    of robustness."""
    failed = []
    for expects, dose in DOSE.items():
        # An effect that lets only a part of a changed decision through may let through nothing:
        # that is a result.
        through = SETS if expects == "selection" else ("full",)
        must_move = (damage.expects == expects) & damage.effect.str.startswith(through)
        wrong = must_move & (damage.strength != 0) & ~(damage[dose] >= LEAST)
        failed.append(damage[wrong].assign(dose=dose))
    found = pd.concat(failed).sort_index()
    names = "; ".join(said(found, found.label + " has " + found.dose + " of 0"))
    return [f"FAILED, changed nothing: {names}"] if names else []
