"""Damage by groups of tokens: where in the sequence, how frequent, from which domain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap
from analysis.stats.pairs import CHECKPOINT, check_choice, check_columns, pair
from analysis.stats.tokens import CleanTokens, Tokens, check_tokens, rises

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
GROUPS: dict[str, Callable[[CleanTokens], tuple[np.ndarray, list[str]]]] = {
    "position": by_position,
    "frequency": by_frequency,
}


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
        return _by_domain(losses, conditions, bootstrap)
    check_tokens(tokens)
    tables = []
    of_checkpoint = groupby(rises(losses, tokens, conditions), key=lambda item: item[0].name)
    for _, items in of_checkpoint:
        labels, sums, cell_N = [], [], None
        for p, clean, name, rise_VN in items:  # one condition's tokens are held at once
            if cell_N is None:
                bin_N, names = GROUPS[by](clean)
                shape = len(names), len(p.documents_D)
                cell_N = bin_N * shape[1] + clean.document_N
                count_GD = np.bincount(cell_N, minlength=shape[0] * shape[1]).reshape(shape)
            summed = np.bincount(cell_N, weights=rise_VN.mean(axis=0), minlength=count_GD.size)
            labels.append(name)
            sums.append(summed.reshape(shape))
        found = _groups(names, labels, np.array(sums), count_GD, bootstrap)
        tables.append(found.assign(**p.checkpoint, by=by))
    return _stack(tables)


def _by_domain(
    losses: pd.DataFrame, conditions: Collection[str] | None, bootstrap: Bootstrap
) -> pd.DataFrame:
    check_columns("losses", losses, ["domain"])
    whole = pair(losses)
    known = dict.fromkeys(name for p in whole for name in p.conditions.label)
    for name in conditions or ():
        check_choice("condition", name, known)
    domains = sorted(losses.domain.unique())
    parts = [{q.name: q for q in pair(losses[losses.domain == domain])} for domain in domains]
    tables = []
    for p in whole:
        labels = [n for n in p.conditions.label if conditions is None or n in conditions]
        if not labels:
            continue
        sum_CGD = np.zeros((len(labels), len(domains), len(p.documents_D)))
        count_GD = np.zeros(sum_CGD.shape[1:])
        for g, part in enumerate(parts):
            if q := part.get(p.name):
                at = np.searchsorted(p.documents_D, q.documents_D)
                count_GD[g, at] = q.tokens_D
                sum_CGD[:, g, at] = [q.delta_D(name) for name in labels]
        found = _groups(domains, labels, sum_CGD, count_GD, bootstrap)
        tables.append(found.assign(**p.checkpoint, by="domain"))
    return _stack(tables)


def _stack(tables: list[pd.DataFrame]) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(tables, ignore_index=True)[COLUMNS]


def _groups(
    names: Sequence[str],
    labels: Sequence[str],
    sum_CGD: np.ndarray,
    count_GD: np.ndarray,
    bootstrap: Bootstrap,
) -> pd.DataFrame:
    total_C = sum_CGD.sum(axis=(1, 2))
    tables = []
    for g, name in enumerate(names):
        has_D = count_GD[g] > 0
        if not has_D.any():
            continue
        sum_CD = sum_CGD[:, g, has_D]
        count_CD = np.broadcast_to(count_GD[g, has_D], sum_CD.shape).astype(float)
        found = bootstrap.intervals(sum_CD, count_CD)
        share_C = np.where(total_C == 0, np.nan, sum_CD.sum(axis=1))
        tables.append(
            pd.DataFrame(
                {"condition": labels, "group": name, "order": g}
                | {"num_documents": has_D.sum(), "num_tokens": int(count_GD[g].sum())}
                | dict(zip(("delta_nats", "low", "high"), found, strict=True))
                | {"share": share_C / np.where(total_C == 0, 1, total_C)}
            )
        )
    rank = {label: i for i, label in enumerate(labels)}
    by_condition = dict(by="condition", key=lambda column: column.map(rank), kind="stable")
    return pd.concat(tables).sort_values(**by_condition)
