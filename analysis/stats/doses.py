"""How much a condition disturbed the routing: sums over tokens and sites -> means."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.pairs import CONDITION, KEY, Pairs, check_columns

# Of one token at one perturbed site, as defined in analysis/doses.py; output_change is the norm
# of the change of the layer's output as a share of the residual stream's.
DOSES = ["mass_moved", "flips", "flips_total", "changed", "mass_lost", "active", "output_change"]


def doses(routing: pd.DataFrame) -> pd.DataFrame:
    """Per checkpoint and condition the columns `DOSES`: means over tokens and perturbed sites."""
    check_columns("routing", routing, [*KEY, "num_tokens", *DOSES])
    rows = routing[routing.perturbation != "clean"]
    sums = rows.groupby(KEY, dropna=False, sort=False)[["num_tokens", *DOSES]].sum()
    return sums[DOSES].div(sums.num_tokens, axis=0).reset_index()


def dose_by_document(p: Pairs, routing: pd.DataFrame, dose: str) -> np.ndarray:
    """(C, D): a dose of the conditions and documents of p, summed over tokens, averaged over sites
    and eval_seeds; NaN where it was not recorded."""
    check_columns("routing", routing, [*KEY, "eval_seed", "document_id", "num_tokens", dose])
    mine = routing[
        (routing.model == p.checkpoint["model"])
        & (routing.train_seed == p.checkpoint["train_seed"])
        & (routing.perturbation != "clean")
    ]
    # A token of a document counts once for each site and eval_seed.
    sums = mine.groupby([*CONDITION, "document_id"], dropna=False)[[dose, "num_tokens"]].sum()
    means = (sums[dose] / sums.num_tokens).unstack("document_id").reindex(columns=p.documents_D)
    rows = pd.MultiIndex.from_frame(p.conditions[CONDITION])
    return means.reindex(rows).to_numpy() * p.tokens_D
