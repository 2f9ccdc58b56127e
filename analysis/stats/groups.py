"""Damage by groups of tokens: where in the sequence, how frequent, from which domain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.columns import CHECKPOINT, check_choice, check_columns
from analysis.stats.pairs import chosen, pair
from analysis.stats.parts import stack
from analysis.stats.tokens import CleanTokens, Tokens, rises

COLUMNS = [
    *CHECKPOINT, "condition", "by", "group", "order", "num_documents", "num_tokens",
    "delta_nats", "low", "high", "share",
]  # fmt: skip


def by_position(clean: CleanTokens) -> tuple[np.ndarray, list[str]]:
    """Position in the sequence, from 0: 0, 1, 2-3, 4-7, ..."""
    # frexp's exponent is exact: 1 for 1, 2 for 2 and 3, 3 for 4 to 7.
    bin_N = np.frexp(clean.position_N)[1]
    return bin_N, ["0", "1"] + [f"{2**k}-{2 ** (k + 1) - 1}" for k in range(1, bin_N.max())]


def by_frequency(clean: CleanTokens) -> tuple[np.ndarray, list[str]]:
    """How often the target occurs among the measured tokens: 1-9, 10-99, ..."""
    count_N = np.bincount(clean.target_N)[clean.target_N]
    bin_N = np.array([len(str(n)) for n in range(count_N.max() + 1)])[count_N] - 1
    return bin_N, [f"{10**k}-{10 ** (k + 1) - 1}" for k in range(bin_N.max() + 1)]


# (the tokens) -> each one's group, and the groups' names in order.
Group = Callable[[CleanTokens], tuple[np.ndarray, list[str]]]
GROUPS: dict[str, Group] = {"position": by_position, "frequency": by_frequency}


def damage_by(
    losses: pd.DataFrame,
    by: str,
    tokens: Tokens | None = None,
    conditions: Collection[str] | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage of groups of tokens: a row per checkpoint, condition (labels; None: all) and group.

    by    "position" in the sequence, in powers of two; "frequency" of the target among the
          measured clean targets, in powers of ten; "domain" of the text, which needs no tokens

    model, family, train_seed, condition, by, group, order (of the groups)
    num_documents, num_tokens    that the group has
    delta_nats, low, high        nats per token of the group, BCa over those documents
    share                        of the whole damage (NaN where there is none)

    Raises `ValueError` for another `by`, an unknown label, and if tokens were not kept.
    """
    check_choice("by", by, [*GROUPS, "domain"])
    if by == "domain":
        sums = _by_domain(losses, conditions)
    else:
        sums = _by_tokens(losses, tokens, conditions, GROUPS[by])
    tables = [_groups(one, bootstrap).assign(**one.checkpoint, by=by) for one in sums]
    return stack(tables, COLUMNS)[COLUMNS]


class Sums(NamedTuple):
    """Of one checkpoint's C conditions over the tokens of G groups in D documents."""

    checkpoint: dict[str, Any]
    labels: list[str]
    names: list[str]  # of the groups
    domain_D: np.ndarray
    delta_CGD: np.ndarray  # nats
    count_GD: np.ndarray  # tokens


def _by_tokens(
    losses: pd.DataFrame, tokens: Tokens | None, conditions: Collection[str] | None, group: Group
) -> Iterator[Sums]:
    for p, clean, changes in rises(losses, tokens, conditions):
        bin_N, names = group(clean)
        shape = len(names), len(p.documents_D)
        cell_N = bin_N * shape[1] + clean.document_N
        count_GD = np.bincount(cell_N, minlength=shape[0] * shape[1]).reshape(shape)
        labels, sums = [], []
        for name, rise_VN in changes:  # one condition's tokens are held at once
            summed = np.bincount(cell_N, weights=rise_VN.mean(axis=0), minlength=count_GD.size)
            labels.append(name)
            sums.append(summed.reshape(shape))
        yield Sums(p.checkpoint, labels, names, p.domain_D, np.array(sums), count_GD)


def _by_domain(losses: pd.DataFrame, conditions: Collection[str] | None) -> Iterator[Sums]:
    check_columns("losses", losses, ["domain"])
    names = sorted(losses.domain.unique())
    # A document may have sequences of several domains.
    parts = [{q.name: q for q in pair(losses[losses.domain == name])} for name in names]
    for p, labels in chosen(losses, conditions):
        delta_CGD = np.zeros((len(labels), len(names), len(p.documents_D)))
        count_GD = np.zeros(delta_CGD.shape[1:])
        for g, part in enumerate(parts):
            if q := part.get(p.name):
                at = np.searchsorted(p.documents_D, q.documents_D)
                count_GD[g, at] = q.tokens_D
                delta_CGD[:, g, at] = [q.delta_D(name) for name in labels]
        yield Sums(p.checkpoint, labels, names, p.domain_D, delta_CGD, count_GD)


def _groups(sums: Sums, bootstrap: Bootstrap) -> pd.DataFrame:
    total_C = np.nansum(sums.delta_CGD, axis=(1, 2))
    total_C[total_C == 0] = np.nan
    tables = []
    for g in np.flatnonzero(sums.count_GD.any(axis=1)):
        count_D = sums.count_GD[g]
        has_D = count_D > 0
        delta_CD = sums.delta_CGD[:, g, has_D]
        own = bootstrap.within(sums.domain_D[has_D])
        count_CD = np.broadcast_to(count_D[has_D], delta_CD.shape).astype(float)
        columns = (
            {"condition": sums.labels, "group": sums.names[g], "order": g}
            | {"num_documents": has_D.sum(), "num_tokens": int(count_D.sum())}
            | own.intervals(delta_CD, count_CD).columns("delta_nats", "low", "high")
            | {"share": delta_CD.sum(axis=1) / total_C}
        )
        tables.append(pd.DataFrame(columns))
    # By condition in their order, which is that of the rows of each table.
    return pd.concat(tables).sort_index(kind="stable")
