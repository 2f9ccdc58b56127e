"""Every token's loss under a condition against the clean run, a condition at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.stats.pairs import UNIT, Pairs, check_choice, pair

# (model, train_seed, condition) -> a row a sequence: document_id, sequence_id, nll (float32 as
# bytes), and of the condition "clean" targets (int32 as bytes).
Tokens = Callable[[str, int, str], pd.DataFrame]


@dataclass(frozen=True)
class CleanTokens:
    """The N tokens of one checkpoint's clean run, sequence by sequence."""

    nll_N: np.ndarray  # nats
    target_N: np.ndarray  # token ids
    position_N: np.ndarray  # in the sequence, from 0
    document_N: np.ndarray  # index into `Pairs.documents_D`


def check_tokens(tokens: Tokens | None) -> None:
    """Raise `ValueError` saying how to keep tokens where they were not kept."""
    if tokens is None:
        raise ValueError(
            "every token's loss is needed and was not kept: give tokens=True to sweep, or write "
            "tokens = true under [measure] of the study"
        )


def rises(
    losses: pd.DataFrame, tokens: Tokens, conditions: Collection[str] | None = None
) -> Iterator[tuple[Pairs, CleanTokens, str, np.ndarray]]:
    """(checkpoint, its clean tokens, label, rise of nll in nats (V, N)) of V eval_seeds.

    conditions   labels; None: all. Raises `ValueError` for one that no checkpoint has, and for
                 tokens that are not those of `losses`.
    """
    pairs = pair(losses)
    known = dict.fromkeys(name for p in pairs for name in p.conditions.label)
    for name in conditions or ():
        check_choice("condition", name, known)
    for p in pairs:
        wanted = p.conditions
        if conditions is not None:
            wanted = wanted[wanted.label.isin(list(conditions))]
        if wanted.empty:
            continue
        key = p.checkpoint["model"], p.checkpoint["train_seed"]
        order = _sequences(losses, p)
        frame = _rows(tokens(*key, "clean"), order, p, "clean")
        clean = _clean(frame, p)
        for name, ids in wanted[["label", "ids"]].itertuples(index=False):
            rows = []
            for condition in ids:
                frame = _rows(tokens(*key, condition), order, p, name)
                nll_N = _joined(frame.nll, np.float32)
                if len(nll_N) != len(clean.nll_N):
                    raise ValueError(
                        f"tokens of {p.name} under {name} are not those of its clean run"
                    )
                rows.append(nll_N.astype(float) - clean.nll_N)
            yield p, clean, name, np.array(rows)


def _sequences(losses: pd.DataFrame, p: Pairs) -> pd.DataFrame:
    mine = losses[
        (losses.model == p.checkpoint["model"])
        & (losses.train_seed == p.checkpoint["train_seed"])
        & (losses.perturbation == "clean")
    ]
    return mine[UNIT].sort_values(UNIT, kind="stable")


def _rows(frame: pd.DataFrame, order: pd.DataFrame, p: Pairs, name: str) -> pd.DataFrame:
    rows = order.merge(frame, on=UNIT, how="left", validate="one_to_one")
    if rows.nll.isna().any():
        raise ValueError(f"tokens of {p.name} under {name} lack sequences that losses have")
    return rows


def _clean(frame: pd.DataFrame, p: Pairs) -> CleanTokens:
    lengths = frame.nll.map(len).to_numpy() // np.dtype(np.float32).itemsize
    document = np.searchsorted(p.documents_D, frame.document_id.to_numpy())
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return CleanTokens(
        nll_N=_joined(frame.nll, np.float32).astype(float),
        target_N=_joined(frame.targets, np.int32),
        position_N=np.arange(lengths.sum()) - starts,
        document_N=np.repeat(document, lengths),
    )


def _joined(column: pd.Series, kind: type) -> np.ndarray:
    return np.frombuffer(b"".join(column), dtype=kind)
