"""Held against a known answer: do metrics of overlap find what `Factorial` says domains share?

Shapes: E experts, Z domains, P pairs of experts, R orders of experts or shuffles of documents,
D documents, S sequences, L length, T = S * L tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from analysis.adapters import owning
from analysis.overlap.metrics import usage
from analysis.overlap.request import check_run, metric_names
from analysis.overlap.routed import by_document, routed_tokens
from analysis.overlap.tables import KEYS, Overlap, site_columns
from analysis.stats import Bootstrap, facts_of, square
from cartmoe.config import check_choice, check_whole
from cartmoe.data import Sequences
from cartmoe.factorial import Factorial

SITE = ["model", "train_seed", "layer", "stage"]
PROFILE = "domain_specialization"


def profiles(overlap: Overlap) -> dict[tuple[str, int, int, int], pd.DataFrame]:
    """By (model, train_seed, layer, stage) the (E, Z) share of an expert's tokens that come from
    each domain, if all domains had equally many; indexed by expert and domain.

    From "domain_specialization" (OLMoE, arXiv 2409.02060, eq. 7), the share of a domain's tokens
    that go to the expert, divided by its sum over domains. An expert without tokens has a row of
    NaN. Raises `ValueError` where that metric was not measured.
    """
    found = {}
    for key, rows in overlap.table(PROFILE).groupby(SITE, sort=False):
        share_EZ = rows.pivot(index="expert", columns="domain", values="value")
        found[key] = share_EZ.div(share_EZ.sum(axis=1), axis=0)
    return found


def shared_truth(profile_EZ: pd.DataFrame, factorial: Factorial) -> pd.DataFrame:
    """(E, E) p_i^T M p_j: expected correlation of the log-odds of two tokens, one drawn from what
    expert i is used for and one from what j is. M is `Factorial.truth`; experts without tokens are
    left out. Raises `ValueError` for domains that the corpus does not have."""
    profile_EZ = profile_EZ.dropna()
    domain_Z = _numbers(profile_EZ.columns, factorial)
    # Rounded so that pairs that share equally much are ties.
    shared_EE = profile_EZ.to_numpy() @ factorial.truth()[np.ix_(domain_Z, domain_Z)]
    shared_EE = (shared_EE @ profile_EZ.to_numpy().T).round(12)
    return pd.DataFrame(shared_EE, profile_EZ.index, profile_EZ.index)


def _corpus(factorial: Factorial | str) -> Factorial:
    if isinstance(factorial, Factorial):
        return factorial
    name, _, options = str(factorial).partition(":")
    check_choice("factorial", name, ["factorial", "factorial:OPTIONS"])
    return Factorial.parse(options)


def _numbers(domains: Collection[str], factorial: Factorial) -> np.ndarray:
    known = factorial.domains
    for domain in domains:
        check_choice(f"domain of {factorial.name!r}", domain, known)
    return np.array([known.index(domain) for domain in domains])


def truth_scores(
    overlap: Overlap,
    factorial: Factorial | str,
    metrics: str | Sequence[str] | None = None,
    *,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """How well metrics of pairs order the pairs of experts by what their domains share.

    overlap    of documents of the corpus, with "domain_specialization"
    factorial  the corpus, or its name, as `analysis.documents` takes it
    metrics    names; None: all of pairs of one site's experts

    A row a checkpoint, site and metric: model, family, train_seed, layer, stage, metric, score,
    null_low, null_high, p, num_pairs. The score is Spearman's correlation over unordered pairs
    between the metric and `shared_truth`; of a metric that depends on the order it is the mean of
    both, and distances change their sign. The null relabels experts (Mantel, Cancer Research 27,
    1967): a 95 % band over `resamples` orders and p, two-sided. NaN where fewer than three pairs
    are defined, or all have one value. Raises `ValueError` for unknown metrics, domains that the
    corpus does not have, and a site without "domain_specialization".
    """
    draws = Bootstrap(resamples=resamples, seed=seed)
    factorial = _corpus(factorial)
    if not isinstance(overlap, Overlap):
        raise ValueError(f"overlap is a {type(overlap).__name__}; give that of measure_overlap")
    if PROFILE not in set(overlap.experts.metric):
        raise ValueError(f"overlap lacks the metric {PROFILE!r}; measure it too")
    shared = {site: shared_truth(p_EZ, factorial) for site, p_EZ in profiles(overlap).items()}
    there = [metric for metric in overlap.pairs.metric.unique() if not facts_of(metric).across]
    wanted = there if metrics is None else metric_names(metrics, there)
    pairs = overlap.pairs[overlap.pairs.metric.isin(wanted)]
    rows = []
    for key, own in pairs.groupby(KEYS, sort=False):
        row = dict(zip(KEYS, key, strict=True))
        site = tuple(row[name] for name in SITE)
        check_choice(f"site with {PROFILE!r}", site, shared)
        truth = shared[site]
        value_EE = square(own).reindex(index=truth.index, columns=truth.index).to_numpy()
        value_EE = (value_EE + value_EE.T) * (-0.5 if facts_of(row["metric"]).apart else 0.5)
        rows.append(row | _score(value_EE, truth.to_numpy(), draws))
    return pd.DataFrame(rows)


def _score(value_EE: np.ndarray, truth_EE: np.ndarray, draws: Bootstrap) -> dict[str, float]:
    i_P, j_P = np.triu_indices(len(truth_EE), 1)
    defined_P = np.isfinite(value_EE[i_P, j_P])
    rank_EE = np.zeros_like(truth_EE)
    rank_EE[i_P, j_P] = rank_EE[j_P, i_P] = rankdata(truth_EE[i_P, j_P])
    i_P, j_P = i_P[defined_P], j_P[defined_P]
    value_P = value_EE[i_P, j_P]
    row = dict.fromkeys(("score", "null_low", "null_high", "p"), np.nan) | {"num_pairs": len(i_P)}
    if len(i_P) < 3 or np.ptp(value_P) == 0 or np.ptp(rank_EE[i_P, j_P]) == 0:
        return row
    value_P = _unit(rankdata(value_P))

    def scores(order_RE: np.ndarray) -> np.ndarray:
        rank_RP = rank_EE[order_RE[:, i_P], order_RE[:, j_P]]
        if not defined_P.all():  # other pairs are left out in every order
            rank_RP = rankdata(rank_RP, axis=-1)
        return _unit(rank_RP) @ value_P

    rng, own_E = np.random.default_rng(draws.seed), np.arange(len(truth_EE))
    score = scores(own_E[None])[0]
    blocks = draws.blocks(len(i_P))
    orders = (rng.permuted(np.tile(own_E, (rows, 1)), axis=1) for rows in blocks)
    null_R = np.concatenate([scores(order_RE) for order_RE in orders])
    low, high = np.quantile(null_R, [0.025, 0.975])
    extreme = (np.abs(null_R) >= abs(score) - 1e-12).sum()
    p = (1 + extreme) / (1 + draws.resamples)  # the order that was found is one of them
    return row | {"score": score, "null_low": low, "null_high": high, "p": p}


def _unit(rank_RP: np.ndarray) -> np.ndarray:
    """Each row centred and of norm 1; 0 where it is constant."""
    rank_RP = rank_RP - rank_RP.mean(-1, keepdims=True)
    norm_R1 = np.linalg.norm(rank_RP, axis=-1, keepdims=True)
    return rank_RP / np.where(norm_R1 > 0, norm_R1, np.inf)


@owning
@torch.no_grad()
def factor_information(
    model: object,
    docs: Sequences,
    factorial: Factorial | str,
    *,
    shuffles: int = 999,
    seed: int = 0,
    batch_size: int = 16,
) -> pd.DataFrame:
    """What each router knows of a document's topic, style, and pair of both.

    docs   of the corpus `factorial`; experts are those that the real run uses, slots of weight 0
           left out

    A row a site: model, family, train_seed, layer, stage, num_documents, num_slots, and for each
    factor of topic, style, pair: mi_FACTOR, the mutual information of a used slot's expert with it
    in nats (Miller-Madow: less (cells - rows - columns + 1) / 2N, cells that occur, of N slots);
    mi_FACTOR_null and mi_FACTOR_high, mean and 95 % quantile over `shuffles` in which documents
    exchange their domains; and mi_FACTOR_p, the share of shuffles with as much. Slots of a document
    are not independent, so Miller-Madow takes away too little: what counts is the distance from the
    null. Raises `ValueError` for a dense model, no documents, and domains of another corpus.
    """
    factorial = _corpus(factorial)
    shuffles = check_whole("shuffles", shuffles, 1)
    model, _ = check_run(model, docs, None, batch_size)
    _, first_D = np.unique(docs.document_id, return_index=True)
    domain_D = _numbers([docs.domain[s] for s in first_D], factorial)
    routed = routed_tokens(model, docs, batch_size)
    rng = np.random.default_rng(seed)
    order_RD = rng.permuted(np.tile(np.arange(len(domain_D)), (shuffles, 1)), axis=1)
    order_RD = np.concatenate([np.arange(len(domain_D))[None], order_RD])
    topic_D, style_D = np.divmod(domain_D, factorial.styles)
    factors = dict(topic=topic_D, style=style_D, pair=domain_D)
    rows = []
    for site, counts_SE in routed.items():
        counts_DE = by_document(docs, counts_SE.T).T
        row = site_columns(model, site) | {"num_documents": len(domain_D)}
        row["num_slots"] = int(counts_DE.sum())
        for factor, label_D in factors.items():
            one_hot_ZD = np.eye(label_D.max() + 1)[label_D].T
            joint_RZE = np.stack([one_hot_ZD[:, order_D] @ counts_DE for order_D in order_RD])
            found, *null = usage.mutual_information(torch.from_numpy(joint_RZE)).numpy()
            row |= {f"mi_{factor}": found, f"mi_{factor}_null": np.mean(null)}
            row[f"mi_{factor}_high"] = np.quantile(null, 0.95)
            row[f"mi_{factor}_p"] = (1 + sum(null >= found - 1e-12)) / (1 + shuffles)
        rows.append(row)
    return pd.DataFrame(rows)
