"""Made-up tables of overlap."""

from __future__ import annotations

import numpy as np
import pandas as pd

FAMILIES = ["smoe", "smoe_share", "cartesian"]
E = 16
DOMAINS = ["code", "docs", "manual pages", "tests"]
SHARES = {"a": 0.55, "b": 0.3, "interaction": 0.15}
SIMILAR = {"cka_row": 0.6, "cka_column": 0.4, "cka_unrelated": 0.2}


def site(model="smoe", layer=0, stage=0, train_seed=0) -> dict:
    """The columns that say where."""
    return dict(model=model, family=model, train_seed=train_seed, layer=layer, stage=stage)


def pairs(
    values_EE, metric="cka", null=0.05, shared=False, diagonal=False, **where
) -> pd.DataFrame:
    """A table of pairs; with shared the last expert has the number -1."""
    i, j = np.indices(values_EE.shape).reshape(2, -1)
    number = np.arange(max(values_EE.shape))
    if shared:
        number[-1] = -1
    value = values_EE.ravel()
    nulls = np.broadcast_to(null, values_EE.shape).ravel()
    table = pd.DataFrame(site(**where) | dict(metric=metric, expert_i=number[i]))
    table = table.assign(expert_j=number[j], value=value, low=value - 0.02, high=value + 0.02)
    table = table.assign(null=nulls, unit="documents", num_units=8)
    return table if diagonal else table[i != j]


def draws(seed, n=E):
    return np.random.default_rng(seed).uniform(0.1, 0.9, (n, n))


def stages_of(family):
    return (0, 1) if family == "cartesian" else (0,)
