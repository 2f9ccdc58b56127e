"""Contrasts that were named beforehand: one model against each other one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, is_number
from analysis.stats.columns import check_choice
from analysis.stats.damage import DIFFERENCE, by_seed, check_documents
from analysis.stats.pairs import Losses, Pairs, pair
from analysis.stats.seeds import permutation_test, ratios, runs_of, sign_flip_test, two_level
from analysis.stats.texts import interval_texts

SEEDS, CHECKPOINTS = "training seeds", "these checkpoints"


def family_contrasts(
    losses: Losses,
    reference: str = "cartesian",
    conditions: Sequence[str] = ("DropTop(1)",),
    margin: float | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage in the reference model minus that in each other model, a row a test.

    reference, model, condition
    speaks_for                "training seeds": means over the seeds of both, two-level bootstrap
                              and permutation test (see `over_seeds`); or, where one of them has a
                              single seed, "these checkpoints": one row for each seed that both
                              have, BCa over documents and a test that flips signs of documents'
                              differences
    train_seed                of the checkpoints, as text; None for training seeds
    seeds, seeds_reference, num_documents
    delta_nats, low, high     nats per token
    p, min_p                  and the smallest p that this number of seeds (documents) allows
    p_holm                    p adjusted by Holm's method (1979) over all rows of this table
    verdict                   "differs": p_holm is at most 1 - confidence. With a margin (in nats
                              per token) also "equivalent within margin": two one-sided tests at
                              1 - confidence, that is, the (2 confidence - 1) interval lies
                              inside of +- margin, row by row (not adjusted for their number);
                              it stands also where p_holm is small. Else
                              "undecided": nothing here says that there is no difference; "no
                              token was changed": neither does the condition.

    Models that lack a condition have no row. Raises `ValueError` for an unknown reference or
    condition, other documents, a margin that is not above 0, and where there is nothing to compare.
    """
    if bootstrap.confidence <= 0.5:
        raise ValueError(f"confidence is {bootstrap.confidence!r}; of a test it must be above 0.5")
    if margin is not None and not (is_number(margin) and margin > 0):
        raise ValueError(f"margin is {margin!r}; it must be above 0 nats per token, or None")
    if isinstance(conditions, str):
        conditions = [conditions]
    pairs = pair(losses)
    of_reference = by_seed(pairs, "reference", reference)
    known = dict.fromkeys(name for p in of_reference.values() for name in p.by_label)
    models = dict.fromkeys(p.checkpoint["model"] for p in pairs)
    others = {model: by_seed(pairs, "model", model) for model in models if model != reference}
    rows = []
    for condition in conditions:
        check_choice(f"condition of {reference}", condition, known)
        for model, of_model in others.items():
            for mine, theirs in _matched(of_reference, of_model, condition):
                named = {"reference": reference, "model": model, "condition": condition}
                rows.append(named | _test(mine, theirs, condition, bootstrap))
    if not rows:
        raise ValueError(f"there is no model but {reference!r} to compare under these conditions")
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table.p.to_numpy())
    inner = table.pop("inner")
    table["verdict"] = np.where(table.p_holm <= 1 - bootstrap.confidence, "differs", "undecided")
    if margin is not None:
        inside = [-margin < low and high < margin for low, high in inner]
        table.loc[inside, "verdict"] = "equivalent within margin"
    table.loc[table.delta_nats.isna(), "verdict"] = "no token was changed"
    return table


def _matched(
    mine: dict[int, Pairs], theirs: dict[int, Pairs], condition: str
) -> list[tuple[list[Pairs], list[Pairs]]]:
    """All seeds that have the condition at once, or, where one of the models has one alone, common
    seeds one by one."""
    a, b = ({s: p for s, p in side.items() if condition in p.by_label} for side in (mine, theirs))
    if min(len(a), len(b)) != 1:
        return [([*a.values()], [*b.values()])] if b else []
    common = [(a[s], b[s]) for s in a if s in b]
    return [([p], [q]) for p, q in common or product(a.values(), b.values())]


def _test(
    mine: list[Pairs], theirs: list[Pairs], condition: str, bootstrap: Bootstrap
) -> dict[str, object]:
    check_documents([*mine, *theirs])
    bootstrap = bootstrap.within(mine[0].domain_D)
    a, b = runs_of(mine, condition), runs_of(theirs, condition)
    one_sided = replace(bootstrap, confidence=2 * bootstrap.confidence - 1)  # two tests at it
    if len(mine) > 1 and len(theirs) > 1:
        named = {"speaks_for": SEEDS, "train_seed": None}
        value, low, high = two_level(a, b, bootstrap)
        _, *inner = two_level(a, b, one_sided)
        p, min_p = permutation_test(ratios(a), ratios(b), bootstrap)
    else:
        numbers = dict.fromkeys(str(p.checkpoint["train_seed"]) for p in (*mine, *theirs))
        named = {"speaks_for": CHECKPOINTS, "train_seed": " and ".join(numbers)}
        delta_CD, tokens_CD = (np.concatenate(arrays) for arrays in zip(a, b, strict=True))
        (value, low, high), (_, *inner) = (
            np.ravel(asked.intervals(delta_CD, tokens_CD, DIFFERENCE)).tolist()
            for asked in (bootstrap, one_sided)
        )
        mine_D, theirs_D = delta_CD / tokens_CD.sum(axis=1, keepdims=True)
        p, min_p = sign_flip_test(mine_D - theirs_D, bootstrap)
    return (
        named
        | {"seeds_reference": len(mine), "seeds": len(theirs)}
        | {"num_documents": len(mine[0].documents_D)}
        | {"delta_nats": value, "low": low, "high": high, "p": p, "min_p": min_p, "inner": inner}
    )


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics 6, 1979); what is NaN
    was no test, and stays."""
    tests = ~np.isnan(p)
    order = np.argsort(p[tests])
    steps = np.maximum.accumulate(p[tests][order] * np.arange(tests.sum(), 0, -1))
    adjusted = np.full(len(p), np.nan)
    adjusted[tests] = np.minimum(steps, 1)[np.argsort(order)]
    return adjusted


def format_contrasts(
    table: pd.DataFrame, margin: float | None = None, confidence: float = 0.95
) -> str:
    """The table as aligned text, with what it speaks for and what it cannot show."""
    head = f"Damage of {table.reference.iloc[0]} minus that of each model, nats per token"
    lines = [head if margin is None else f"{head}; equivalence margin {margin:g}"]
    shown = pd.DataFrame(
        {
            "condition": table.condition,
            "model": table.model,
            "difference": interval_texts(table, "delta_nats", "low", "high"),
            **{name: [f"{v:.2g}" for v in table[name]] for name in ("p", "min_p", "p_holm")},
            "verdict": table.verdict,
            "speaks for": [
                f"{row.seeds_reference} and {row.seeds} {SEEDS}"
                if row.speaks_for == SEEDS
                else f"the checkpoints of seed {row.train_seed} only"
                for row in table.itertuples()
            ],
        }
    )
    lines.append(shown.to_string(index=False))
    least = (table.min_p * len(table)).min()
    if least > 1 - confidence:
        lines.append(
            f"With {len(table)} tests over so few seeds or documents the smallest adjusted p is "
            f"{min(1.0, least):.2g}: no difference, however large, could be shown."
        )
    if margin is None:
        lines.append('"undecided" does not say that there is no difference: that needs a margin.')
    return "\n".join(lines)
