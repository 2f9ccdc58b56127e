"""What a condition costs, against the clean run of the same documents.

An interval over documents speaks for one checkpoint; seeds.py compares training runs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.stats.bootstrap import Bootstrap, Intervals
from analysis.stats.doses import doses
from analysis.stats.pairs import KEY, Losses, Pairs, check_choice, pair

LN2 = np.log(2)


def damage(
    losses: Losses,
    routing: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """One row per checkpoint and condition, in the order of their appearance.

    model, family, train_seed, perturbation, strength, where, point, effect, downstream, expects,
    label
    num_documents, num_tokens     of the clean run
    clean_nats, nats              per token
    delta_nats, low, high         sum(nll - clean nll) / sum(tokens), paired BCa over documents
    delta_bits_per_byte, bpb_low, bpb_high    the same per byte: tokenizers differ
    clean_perplexity, perplexity, perplexity_ratio, ratio_low, ratio_high    exp of the above
    kl, agreement                 KL(clean || perturbed) in nats, share of equal top-1 tokens
    delta_max                     the largest rise of one token's loss, in nats
    mass_moved, flips, flips_total, changed, mass_lost, active, output_change    with `routing`
        only: the dose per token, averaged over the perturbed sites; see `stats.doses`

    eval_seeds are averaged within a document first. A condition that changes nothing gets
    exactly 0 and [0, 0]; fewer than two documents give NaN bounds. Raises `ValueError` naming
    missing columns and conditions that are not paired (see `pairs.pair`).
    """
    tables = []
    for p in pair(losses):
        if p.conditions.empty:
            continue
        num_conditions, clean = len(p.conditions), p.clean_D.sum() / p.tokens_D.sum()
        found = bootstrap.intervals(
            np.concatenate([p.delta_CD, p.delta_CD / LN2]),
            np.repeat([p.tokens_D, p.bytes_D], num_conditions, axis=0),
        )
        nats, bits = (Intervals(*rows) for rows in np.split(np.array(found), 2, axis=1))
        columns = {
            "num_documents": len(p.documents_D),
            "num_tokens": int(p.tokens_D.sum()),
            "clean_nats": clean,
            "nats": clean + nats.value_M,
            **dict(zip(("delta_nats", "low", "high"), nats, strict=True)),
            **dict(zip(("delta_bits_per_byte", "bpb_low", "bpb_high"), bits, strict=True)),
            "clean_perplexity": np.exp(clean),
            "perplexity": np.exp(clean + nats.value_M),
            "perplexity_ratio": np.exp(nats.value_M),
            "ratio_low": np.exp(nats.low_M),
            "ratio_high": np.exp(nats.high_M),
            "kl": p.kl_C,
            "agreement": p.agreement_C,
            "delta_max": p.delta_max_C,
        }
        table = p.conditions.drop(columns="ids").assign(**columns)
        for i, (name, value) in enumerate(p.checkpoint.items()):
            table.insert(i, name, value)
        tables.append(table)
    if not tables:
        raise ValueError("losses have clean rows only: there is no condition to compare with them")
    table = pd.concat(tables, ignore_index=True)
    return table if routing is None else table.merge(doses(routing), on=KEY, how="left")


def clean_table(losses: Losses, bootstrap: Bootstrap = Bootstrap()) -> pd.DataFrame:
    """The clean runs, one row per checkpoint (those without a router too: the paper's Table 1).

    model, family, train_seed, num_documents, num_tokens, nats, low, high (per token),
    perplexity, perplexity_low, perplexity_high, bits_per_byte, bpb_low, bpb_high.
    """
    rows = []
    for p in pair(losses):
        sums = np.array([p.clean_D, p.clean_D / LN2])
        weights = np.array([p.tokens_D, p.bytes_D])
        nats, bits = zip(*bootstrap.intervals(sums, weights), strict=True)
        rows.append(
            p.checkpoint
            | {"num_documents": len(p.documents_D), "num_tokens": int(p.tokens_D.sum())}
            | dict(zip(("nats", "low", "high"), nats, strict=True))
            | dict(
                zip(("perplexity", "perplexity_low", "perplexity_high"), np.exp(nats), strict=True)
            )
            | dict(zip(("bits_per_byte", "bpb_low", "bpb_high"), bits, strict=True))
        )
    return pd.DataFrame(rows)


def difference(
    losses: pd.DataFrame,
    a: str,
    b: str,
    bootstrap: Bootstrap = Bootstrap(),
) -> pd.DataFrame:
    """Damage of condition a minus damage of condition b in the same checkpoint, by document.

    a and b are labels, for example "DropTop(1)" and "DropChosen(1)". One row per checkpoint
    that has other than clean rows: model, family, train_seed, a, b, num_documents, delta_nats,
    low, high, delta_bits_per_byte, bpb_low, bpb_high. Raises `ValueError` listing a
    checkpoint's labels when one is unknown.
    """
    return pd.DataFrame(
        [
            p.checkpoint | {"a": a, "b": b} | _contrast(p, a, p, b, bootstrap)
            for p in pair(losses)
            if len(p.conditions)
        ]
    )


def contrast_models(
    losses: Losses,
    model_a: str,
    model_b: str,
    condition: str,
    bootstrap: Bootstrap = Bootstrap(),
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
    return pd.DataFrame(
        [
            {"model_a": model_a, "model_b": model_b, "train_seed": s, "condition": condition}
            | _contrast(of_a[s], condition, of_b[s], condition, bootstrap)
            for s in common
        ]
    )


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


def _contrast(p: Pairs, a: str, q: Pairs, b: str, bootstrap: Bootstrap) -> dict[str, float]:
    delta_a, delta_b = p.delta_D(a), q.delta_D(b)
    nats, bits = zip(
        *bootstrap.intervals(
            np.array([delta_a, delta_b, delta_a / LN2, delta_b / LN2]),
            np.array([p.tokens_D, q.tokens_D, p.bytes_D, q.bytes_D]),
            np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]),
        ),
        strict=True,
    )
    return (
        {"num_documents": len(p.documents_D)}
        | dict(zip(("delta_nats", "low", "high"), nats, strict=True))
        | dict(zip(("delta_bits_per_byte", "bpb_low", "bpb_high"), bits, strict=True))
    )
