"""What a condition costs, against the clean run of the same documents.

An interval over documents speaks for one checkpoint; seeds.py compares training runs.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, Intervals
from analysis.stats.columns import KEY, check_choice
from analysis.stats.doses import doses
from analysis.stats.pairs import Losses, Pairs, pair, pair_conditions
from analysis.stats.texts import FEW_DOCUMENTS

DIFFERENCE = np.array([[1.0], [-1.0]])  # contrast of two ratios


def damage(
    losses: Losses, routing: pd.DataFrame | None = None, bootstrap: Bootstrap = Bootstrap()
) -> pd.DataFrame:
    """One row per checkpoint and condition, in the order of their appearance.

    model, family, train_seed, perturbation, strength, where, point, effect, downstream, expects,
    label
    num_documents, num_tokens     of the clean run
    clean_nats, nats              per token
    delta_nats, low, high         sum(nll - clean nll) / sum(tokens), paired BCa over documents,
        which are resampled within the domains that most of their tokens are of
    delta_bits_per_byte, bpb_low, bpb_high    the same per byte: tokenizers differ
    clean_perplexity, perplexity, perplexity_ratio, ratio_low, ratio_high    exp of the above
    kl, agreement                 KL(clean || perturbed) in nats, share of equal top-1 tokens
    delta_max                     the largest rise of one token's loss, in nats
    note                          "few documents" for an interval (fewer than `FEW_DOCUMENTS`), "no
        token was changed", or ""
    num_touched                   tokens whose decision the condition could change, at any site; of
        none, every change is NaN, with a warning: it says nothing about robustness
    mass_moved, flips, flips_total, changed, mass_lost, active, output_change    with `routing`
        only: the dose per token, averaged over the perturbed sites; see `stats.doses`

    eval_seeds are averaged within a document first. A condition that changes nothing gets
    exactly 0 and [0, 0]; fewer than two documents give NaN bounds. Raises `ValueError` naming
    missing columns and conditions that are not paired (see `pairs.pair`).
    """
    tables = []
    for p in pair_conditions(losses):
        own = bootstrap.within(p.domain_D)
        nats, bits = _in_both_units(p.delta_CD, p.tokens_D, p.bytes_D, own)
        clean = p.clean_D.sum() / p.tokens_D.sum()
        ratio = Intervals(*np.exp(nats))
        table = p.table(
            num_documents=len(p.documents_D),
            num_tokens=int(p.tokens_D.sum()),
            clean_nats=clean,
            nats=clean + nats.value_M,
            **nats.columns("delta_nats", "low", "high"),
            **bits.columns("delta_bits_per_byte", "bpb_low", "bpb_high"),
            clean_perplexity=np.exp(clean),
            perplexity=np.exp(clean + nats.value_M),
            **ratio.columns("perplexity_ratio", "ratio_low", "ratio_high"),
            **p.measured,
        )
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    if table.num_touched.notna().all():
        table["num_touched"] = table.num_touched.round().astype(int)
    nothing = table[table.num_touched == 0]
    table["note"] = np.where(table.num_documents < FEW_DOCUMENTS, "few documents", "")
    table.loc[nothing.index, "note"] = "no token was changed"
    if len(nothing):
        warnings.warn(
            f"no token could be changed by {', '.join(nothing.label.unique())}: what that costs is "
            "not known (NaN). Look at its where, and at the lengths of the documents",
            stacklevel=2,
        )
    if routing is None:
        return table
    measured = doses(routing)
    table = table.merge(measured, on=KEY, how="left")
    table.loc[table.num_touched == 0, measured.columns.drop(KEY)] = np.nan
    return table


def clean_table(losses: Losses, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
    """The clean runs, one row per checkpoint (those without a router too: the paper's Table 1).

    model, family, train_seed, num_documents, num_tokens, nats, low, high (per token),
    perplexity, perplexity_low, perplexity_high, bits_per_byte, bpb_low, bpb_high.
    """
    tables = []
    for p in pair(losses):
        own = bootstrap.within(p.domain_D)
        nats, bits = _in_both_units(p.clean_D[None], p.tokens_D, p.bytes_D, own)
        columns = (
            {"num_documents": len(p.documents_D), "num_tokens": int(p.tokens_D.sum())}
            | nats.columns("nats", "low", "high")
            | Intervals(*np.exp(nats)).columns("perplexity")
            | bits.columns("bits_per_byte", "bpb_low", "bpb_high")
        )
        tables.append(pd.DataFrame(p.checkpoint | columns))
    return pd.concat(tables, ignore_index=True)


def difference(
    losses: pd.DataFrame, a: str, b: str, bootstrap: Bootstrap = Bootstrap()
) -> pd.DataFrame:
    """Damage of condition a minus damage of condition b in the same checkpoint, by document.

    a and b are labels, for example "DropTop(1)" and "DropChosen(1)". One row per checkpoint
    that has other than clean rows: model, family, train_seed, a, b, num_documents, delta_nats,
    low, high, delta_bits_per_byte, bpb_low, bpb_high. Raises `ValueError` listing a
    checkpoint's labels when one is unknown, and where there are clean rows alone.
    """
    tables = [
        pd.DataFrame(p.checkpoint | {"a": a, "b": b} | _contrast(p, a, p, b, bootstrap))
        for p in pair_conditions(losses)
    ]
    return pd.concat(tables, ignore_index=True)


def contrast_models(
    losses: Losses, model_a: str, model_b: str, condition: str, bootstrap: Bootstrap = Bootstrap()
) -> pd.DataFrame:
    """Damage of one condition (a label) in model_a minus that in model_b, by document.

    One row for each train_seed that both have: model_a, model_b, train_seed, condition,
    num_documents, delta_nats, low, high, delta_bits_per_byte, bpb_low, bpb_high. It speaks for
    that pair of checkpoints only; with another tokenizer, read the bits per byte. Raises
    `ValueError` for unknown models and conditions, no common train_seed, other documents.
    """
    pairs = pair(losses)
    of_a, of_b = by_seed(pairs, "model_a", model_a), by_seed(pairs, "model_b", model_b)
    common = [s for s in of_a if s in of_b]
    if not common:
        raise ValueError(
            f"{model_a} has train_seed {', '.join(map(str, of_a))} and {model_b} has "
            f"{', '.join(map(str, of_b))}; none is common: compare them with over_seeds"
        )
    check_documents([*of_a.values(), *of_b.values()])
    tables = []
    for s in common:
        named = {"model_a": model_a, "model_b": model_b, "train_seed": s, "condition": condition}
        contrast = _contrast(of_a[s], condition, of_b[s], condition, bootstrap)
        tables.append(pd.DataFrame(named | contrast))
    return pd.concat(tables, ignore_index=True)


def by_seed(pairs: list[Pairs], name: str, model: str) -> dict[int, Pairs]:
    """The checkpoints of one model by train_seed."""
    check_choice(name, model, dict.fromkeys(p.checkpoint["model"] for p in pairs))
    return {p.checkpoint["train_seed"]: p for p in pairs if p.checkpoint["model"] == model}


def check_documents(pairs: list[Pairs]) -> None:
    """Raise `ValueError` naming two checkpoints that were not measured on the same documents."""
    first, *rest = pairs
    for other in rest:
        if not np.array_equal(first.documents_D, other.documents_D):
            raise ValueError(f"{first.name} and {other.name} were measured on other documents")


def _contrast(p: Pairs, a: str, q: Pairs, b: str, bootstrap: Bootstrap) -> dict[str, object]:
    """Columns of the one row."""
    deltas_CD = np.array([p.delta_D(a), q.delta_D(b)])
    tokens_CD, bytes_CD = np.array([p.tokens_D, q.tokens_D]), np.array([p.bytes_D, q.bytes_D])
    own = bootstrap.within(p.domain_D)
    nats, bits = _in_both_units(deltas_CD, tokens_CD, bytes_CD, own, DIFFERENCE)
    return {
        "num_documents": len(p.documents_D),
        **nats.columns("delta_nats", "low", "high"),
        **bits.columns("delta_bits_per_byte", "bpb_low", "bpb_high"),
    }


def _in_both_units(
    nats_CD: np.ndarray,
    tokens_CD: np.ndarray,
    bytes_CD: np.ndarray,
    bootstrap: Bootstrap,
    contrast_CM: np.ndarray | None = None,
) -> list[Intervals]:
    """Nats per token and bits per byte, from the same draws; tokens and bytes may be (D,)."""
    weights_CD = [np.broadcast_to(some, nats_CD.shape) for some in (tokens_CD, bytes_CD)]
    found = bootstrap.intervals(
        np.concatenate([nats_CD, nats_CD / np.log(2)]),
        np.concatenate(weights_CD),
        None if contrast_CM is None else np.kron(np.eye(2), contrast_CM),
    )
    return [Intervals(*half) for half in np.split(np.array(found), 2, axis=1)]
