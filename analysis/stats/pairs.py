"""Rows of losses -> one checkpoint's conditions, each paired with the clean run by document."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from analysis.stats.columns import (
    CHECKPOINT,
    CONDITION,
    KEY,
    MEASURED,
    NAMED,
    OTHER,
    SUMS,
    UNIT,
    check_choice,
    check_columns,
    label,
    label_of,
)


@dataclass(frozen=True)
class Pairs:
    """One checkpoint: C conditions on the D documents of its clean run, in order of their ids.

    Sums over a document's tokens; those of a condition are averaged over its eval_seeds.
    """

    checkpoint: dict[str, Any]
    documents_D: np.ndarray
    domain_D: np.ndarray  # of most of its tokens
    tokens_D: np.ndarray
    bytes_D: np.ndarray
    clean_D: np.ndarray  # nats
    conditions: pd.DataFrame  # CONDITION, NAMED, expects, label and ids (a tuple), a row each
    delta_CD: np.ndarray  # nats above the clean run; NaN of what touched no token
    measured: pd.DataFrame  # kl (nats per token), agreement (share), delta_max (nats, of a token),
    # num_touched (tokens that could be changed, NaN where that is not known)

    @property
    def name(self) -> str:
        return _name(self.checkpoint)

    def delta_D(self, condition: str) -> np.ndarray:
        """The documents' damage under the condition with this label."""
        check_choice(f"condition of {self.name}", condition, self.by_label)
        return self.delta_CD[self.conditions.label.tolist().index(condition)]

    def table(self, **columns: object) -> pd.DataFrame:
        """A row a condition: the checkpoint, what names the condition, and these columns."""
        named = self.conditions.drop(columns="ids")
        table = named.assign(**self.checkpoint, **columns)
        return table[[*self.checkpoint, *named, *columns]]

    @functools.cached_property
    def by_label(self) -> dict[str, dict[str, Any]]:
        """label -> the columns `CONDITION` and `NAMED` of that condition."""
        rows = self.conditions[[*CONDITION, *NAMED]].to_dict("records")
        return dict(zip(self.conditions.label, rows, strict=True))

    def variant(self, condition: str, **options: str) -> str:
        """The label of what differs from a condition that was run in these options alone."""
        return label_of(**(self.by_label[condition] | options))


Losses: TypeAlias = "pd.DataFrame | list[Pairs]"  # the table, or what `pair` made of it


def pair(losses: Losses) -> list[Pairs]:
    """Pair every condition with the clean rows of the same checkpoint, sequence by sequence.

    What is paired already is returned as it is: tables of the same losses may share it.
    Raises `ValueError` for missing columns, a checkpoint without clean rows, conditions that
    do not have exactly the clean run's sequences and token counts at every eval_seed (which
    two conditions of one label never have), and sums of nll that are not finite.
    """
    if isinstance(losses, list):
        return losses
    check_columns("losses", losses, [*KEY, *OTHER, *UNIT, *SUMS])
    # Sorting first makes every later sum, and the documents' draws, free of the rows' order.
    losses = losses.sort_values([*UNIT, "eval_seed"], kind="stable")
    losses = losses.assign(unit=losses.groupby(UNIT, dropna=False).ngroup())
    groups = losses.groupby(CHECKPOINT, sort=False, dropna=False)
    return [_pair_one(dict(zip(CHECKPOINT, key, strict=True)), rows) for key, rows in groups]


def pair_conditions(losses: Losses) -> list[Pairs]:
    """`pair` without checkpoints that have clean rows only; `ValueError` if there is no other."""
    pairs = [p for p in pair(losses) if len(p.conditions)]
    if not pairs:
        raise ValueError("losses have clean rows only: there is no condition to compare with them")
    return pairs


def chosen(losses: Losses, conditions: Collection[str] | None) -> Iterator[tuple[Pairs, list[str]]]:
    """Checkpoints in which conditions (labels; None: all) could change tokens, and which did.

    Raises `ValueError` with the choices for a label that no checkpoint has, and where one of them,
    or all, could change no token.
    """
    pairs = pair(losses)
    known = dict.fromkeys(name for p in pairs for name in p.by_label)
    touching = [(p, list(p.conditions.label[p.measured.num_touched != 0])) for p in pairs]
    could = {name for _, names in touching for name in names}
    if known and not could:
        raise ValueError("no condition could change any token")
    for name in conditions or ():
        check_choice("condition", name, known)
        if name not in could:
            raise ValueError(f"condition is {name!r}, which could change no token")
    for p, names in touching:
        if own := [name for name in names if conditions is None or name in conditions]:
            yield p, own


def _name(checkpoint: Mapping[str, object]) -> str:
    return f"{checkpoint['model']} (train_seed {checkpoint['train_seed']})"


def _pair_one(checkpoint: dict[str, Any], rows: pd.DataFrame) -> Pairs:
    name = _name(checkpoint)
    is_clean = rows.perturbation == "clean"
    clean = rows[is_clean]
    if clean.empty:
        raise ValueError(f"losses of {name} have no clean rows (perturbation 'clean')")
    if clean.unit.duplicated().any():
        raise ValueError(f"losses of {name} have more than one clean row for a sequence")
    if not np.isfinite(clean.nll_sum).all():
        raise ValueError(f"an nll_sum of {name} is not finite: clean")
    documents_D, document = np.unique(clean.document_id.to_numpy(), return_inverse=True)

    def by_document(values: np.ndarray) -> np.ndarray:
        return np.bincount(document, weights=values, minlength=len(documents_D))

    conditions, paired, deltas, measured = ([] for _ in range(4))
    for condition, arm in rows[~is_clean].groupby(CONDITION, sort=False, dropna=False):
        known = arm[[*NAMED, "expects"]].iloc[0]
        conditions.append((*condition, *known, tuple(arm.condition.unique())))
        runs = [run for _, run in arm.groupby("eval_seed", sort=False)]
        paired.append(all(_same_sequences(run, clean) for run in runs))
        if paired[-1]:
            nll = np.mean([run.nll_sum for run in runs], axis=0)
            # Differences before sums: equal rows then give a zero that is exact.
            deltas.append(by_document(nll - clean.nll_sum.to_numpy()))
            shares = [arm[name].sum() / arm.num_tokens.sum() for name in ("kl_sum", "num_agree")]
            touched = arm.num_touched.sum() / len(runs) if "num_touched" in arm else np.nan
            measured.append((*shares, arm.delta_max.max(), touched))
    table = pd.DataFrame(conditions, columns=[*CONDITION, *NAMED, "expects", "ids"])
    table["label"] = label(table)
    if not all(paired):
        raise ValueError(
            f"conditions of {name} are not paired with its clean run (each needs the same "
            "sequences and token counts, once per eval_seed; conditions that differ in nothing "
            f"but their ids need names of their own): {_listed(table[~np.array(paired)])}"
        )
    delta_CD = np.reshape(deltas, (len(deltas), len(documents_D)))
    finite_C = np.isfinite(delta_CD).all(axis=1)
    if not finite_C.all():
        raise ValueError(f"an nll_sum of {name} is not finite: {_listed(table[~finite_C])}")
    known = pd.DataFrame(measured, columns=MEASURED, dtype=float)
    nothing_C = (known.num_touched == 0).to_numpy()
    delta_CD[nothing_C] = np.nan  # what was never disturbed shows no robustness
    known.loc[nothing_C, ["kl", "agreement", "delta_max"]] = np.nan
    return Pairs(
        checkpoint=checkpoint,
        documents_D=documents_D,
        domain_D=_domains(clean),
        tokens_D=by_document(clean.num_tokens),
        bytes_D=by_document(clean.num_bytes),
        clean_D=by_document(clean.nll_sum),
        conditions=table,
        delta_CD=delta_CD,
        measured=known,
    )


def _domains(clean: pd.DataFrame) -> np.ndarray:
    """Of each document, in order of their ids; all of one where the losses know none."""
    domain = clean.domain if "domain" in clean else ""
    sizes = clean.assign(domain=domain).groupby(["document_id", "domain"]).num_tokens.sum()
    return sizes.unstack(fill_value=0).idxmax(axis=1).sort_index().to_numpy()


def _same_sequences(run: pd.DataFrame, clean: pd.DataFrame) -> bool:
    return all(np.array_equal(run[c], clean[c]) for c in ("unit", "num_tokens"))


def _listed(failed: pd.DataFrame) -> str:
    rows = failed[["label", "ids"]].itertuples(index=False)
    return "; ".join(f"{name} [{', '.join(map(str, ids))}]" for name, ids in rows)
