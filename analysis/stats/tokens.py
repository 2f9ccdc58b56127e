"""Every token's loss under a condition against the clean run, a condition at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.stats.columns import UNIT, of_checkpoint
from analysis.stats.pairs import Pairs, chosen

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


def rises(
    losses: pd.DataFrame, tokens: Tokens | None, conditions: Collection[str] | None = None
) -> Iterator[tuple[Pairs, CleanTokens, Iterator[tuple[str, np.ndarray]]]]:
    """(checkpoint, its clean tokens, (label, rise of nll in nats (V, N)) of V eval_seeds).

    conditions   labels; None: all. Raises `ValueError` for one that no checkpoint has, and for
                 tokens that are not those of `losses`, or were not kept.
    """
    if tokens is None:
        raise ValueError(
            "every token's loss is needed and was not kept: give tokens=True to sweep, or write "
            "tokens = true under [measure] of the study"
        )
    for p, names in chosen(losses, conditions):
        rows = of_checkpoint(losses, p.checkpoint)
        order = rows[rows.perturbation == "clean"][UNIT].sort_values(UNIT, kind="stable")
        clean = _clean(_rows(tokens, p, order, "clean", "clean"), p)
        yield p, clean, _rises(tokens, p, order, clean, names)


def _rises(
    tokens: Tokens, p: Pairs, order: pd.DataFrame, clean: CleanTokens, names: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
    ids = p.conditions.set_index("label").ids
    for name in names:
        rows = []
        for condition in ids[name]:
            nll_N = _joined(_rows(tokens, p, order, condition, name).nll, np.float32)
            if len(nll_N) != len(clean.nll_N):
                raise ValueError(f"tokens of {p.name} under {name} are not those of its clean run")
            rows.append(nll_N.astype(float) - clean.nll_N)
        yield name, np.array(rows)


def _rows(tokens: Tokens, p: Pairs, order: pd.DataFrame, condition: str, name: str) -> pd.DataFrame:
    """Those of a condition (by its id) in the order of these sequences."""
    frame = tokens(p.checkpoint["model"], p.checkpoint["train_seed"], condition)
    rows = order.merge(frame, on=UNIT, how="left", validate="one_to_one")
    if rows.nll.isna().any():
        raise ValueError(f"tokens of {p.name} under {name} lack sequences that losses have")
    return rows


def _clean(frame: pd.DataFrame, p: Pairs) -> CleanTokens:
    lengths = frame.nll.map(len).to_numpy() // np.dtype(np.float32).itemsize
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return CleanTokens(
        nll_N=_joined(frame.nll, np.float32).astype(float),
        target_N=_joined(frame.targets, np.int32),
        position_N=np.arange(lengths.sum()) - starts,
        document_N=np.repeat(np.searchsorted(p.documents_D, frame.document_id.to_numpy()), lengths),
    )


def _joined(column: pd.Series, kind: type) -> np.ndarray:
    return np.frombuffer(b"".join(column), dtype=kind)


QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
WORST = (0.01, 0.1)
ROUNDING = float(np.finfo(np.float32).eps)  # of a loss, relative


def tails(
    losses: pd.DataFrame, tokens: Tokens | None, conditions: Collection[str] | None = None
) -> pd.DataFrame:
    """The rise of single tokens' losses: one row per checkpoint and condition (labels; None: all).

    model, family, train_seed, condition, num_tokens
    mean, q0.01, q0.1, q0.5, q0.9, q0.99, q0.999, max     nats
    rising                     share of tokens that got worse
    worst_0.01, worst_0.1      share of the whole damage that the worst 1 % and 10 % of tokens
                               carry; above 1 where the others gain, NaN where there is no
                               damage beyond the rounding of the losses

    Every eval_seed counts as tokens of its own. Raises `ValueError` if tokens were not kept.
    """
    rows = []
    for named, fall_N, whole in _falling(losses, tokens, conditions):
        size = len(fall_N)
        worst = {share: max(1, round(share * size)) for share in WORST}
        rows.append(
            named
            | {"num_tokens": size, "mean": fall_N.mean()}
            | {f"q{q:g}": np.quantile(fall_N, q) for q in QUANTILES}
            | {"max": fall_N[0], "rising": (fall_N > 0).mean()}
            | {f"worst_{share:g}": fall_N[:n].sum() / whole for share, n in worst.items()}
        )
    return pd.DataFrame(rows)


def tail_curve(
    losses: pd.DataFrame,
    tokens: Tokens | None,
    conditions: Collection[str] | None = None,
    points: int = 60,
) -> pd.DataFrame:
    """The same as curves: model, family, train_seed, condition, share (of tokens, the worst
    first, from one token to all on a logarithmic grid), rise (the least among them, in nats) and
    carried (their share of the whole damage). Raises `ValueError` if tokens were not kept."""
    tables = []
    for named, fall_N, whole in _falling(losses, tokens, conditions):
        count = np.unique(np.geomspace(1, len(fall_N), points).round().astype(int))
        columns = {"share": count / len(fall_N), "rise": fall_N[count - 1]}
        carried = [fall_N[:n].sum() / whole for n in count]
        tables.append(pd.DataFrame(named | columns | {"carried": carried}))
    return pd.concat(tables, ignore_index=True)


def _falling(
    losses: pd.DataFrame, tokens: Tokens | None, conditions: Collection[str] | None
) -> Iterator[tuple[dict[str, object], np.ndarray, float]]:
    """(what names a checkpoint and condition, its tokens' rises from the greatest down, their sum:
    NaN where it is but rounding)."""
    for p, clean, changes in rises(losses, tokens, conditions):
        for name, rise_VN in changes:
            fall_N = np.sort(rise_VN, axis=None)[::-1]
            shown = fall_N.mean() > ROUNDING * clean.nll_N.mean()
            yield p.checkpoint | {"condition": name}, fall_N, fall_N.sum() if shown else np.nan
