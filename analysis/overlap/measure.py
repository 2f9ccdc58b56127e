"""What the experts of a model have in common, measured on documents: streams over one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from analysis.adapters import Adapter
from analysis.overlap.metrics import (
    MAX_UNITS,
    METRICS,
    PAIR_TOKENS,
    SHARES,
    TABLES,
    TOKENS,
    CompositeStream,
    Estimate,
    ExpertWeights,
    Metric,
    OutputStream,
    SecondStage,
    Stream,
    SubstitutionStream,
    UsageStream,
    estimate,
)
from analysis.overlap.probes import Labels, Probes, packs_of
from analysis.overlap.request import DAMAGE, check_request, check_tokens, composed
from analysis.overlap.tables import KEYS, VALUES, Overlap, rows_of
from analysis.stats import INDEX, check_confidence
from cartmoe.config import check_whole
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite

FEWEST_BATCHES = 8  # where there are as many sequences: with fewer units intervals are very wide


@torch.no_grad()
def measure_overlap(
    model: object,
    docs: Sequences,
    metrics: str | Sequence[str] | None = None,
    sites: Any = None,
    probe: str = "all",
    *,
    batch_size: int = 8,
    minibatch: int = 256,
    skip_first: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> Overlap:
    """Tables of what experts have in common; `METRICS` says what each metric is and its null.

    metrics     names; None: all that fit the model but those of kind "function", which are damage
    sites       a `RouterSite`, a list of them, or "layer 2", "stage 0", ...; None: all
    probe       for metrics of expert outputs: "all" experts on the same tokens, those "routed" to
                expert i, or to "either" of i and j
    batch_size  sequences at a time, fewer where there would be less than 8 batches. These are made
                of whole documents, and are what the jackknife leaves out (of more than 32 several
                at once)
    minibatch   tokens of which one HSIC of debiased CKA is made
    skip_first  leave out the first token of each sequence, on which all attention dwells

    Routing is that of the real run, as the experts were given it. Memory does not grow with the
    documents, only with the number of domains that they are of. Raises `ValueError` for a dense
    model, unknown names, metrics that do not fit the model, documents without a token to measure
    on, and numbers out of range.
    """
    model, chosen, wanted = check_request(model, metrics, sites, probe)
    check_confidence(confidence)
    check_whole("batch_size", batch_size, 1)
    check_whole("minibatch", minibatch, 4)
    check_whole("seed", seed, 0)
    check_tokens(docs, model, skip_first)
    batch_size = min(batch_size, max(1, len(docs) // FEWEST_BATCHES))
    packs = list(packs_of(docs, batch_size, seed))
    units = min(len(packs), MAX_UNITS)
    labels = Labels.of(docs, seed)
    kinds = {METRICS[name].kind for name in wanted}
    options = dict(probe=probe, minibatch=minibatch, seed=seed)
    streams = {site: _streams(model, site, wanted, units, labels, options) for site in chosen}
    if "composite" in kinds:
        squares = any(name in SHARES for name in wanted)
        tokens = TOKENS if squares else PAIR_TOKENS
        for site, stream in _composites(model, chosen, units, tokens).items():
            streams[site]["composite"] = stream
    if any(streams.values()):
        with tqdm(total=len(docs), unit="sequence", disable=not progress) as bar:
            for number, rows in enumerate(packs):
                for first in range(0, len(rows), batch_size):
                    some = rows[first : first + batch_size]
                    probes = Probes(model, docs, some, labels, skip_first, (seed, number, first))
                    for site, probe_ in probes.of(chosen, number % units, DAMAGE in kinds):
                        for stream in streams[site].values():
                            stream.add(probe_)
                    bar.update(len(some))
    return _tables(model, wanted, streams, labels, units, len(packs), confidence)


def _streams(
    model: Adapter, site: RouterSite, wanted: list[str], units: int, labels: Labels, options: dict
) -> dict[str, Stream]:
    """By kind, what sums over this site's tokens."""
    streams: dict[str, Stream] = {}
    metrics = [METRICS[name] for name in wanted]
    kinds = {metric.kind for metric in metrics}
    if "usage" in kinds:
        classes = any(m.kind == "usage" and not m.units for m in metrics)
        sizes = labels.num_classes, len(labels.domains)
        streams["usage"] = UsageStream(site, units, *sizes, classes)
    if "outputs" in kinds:
        streams["outputs"] = OutputStream(model, site, units, **options)
    if DAMAGE in kinds:
        streams[DAMAGE] = SubstitutionStream(model, site, units)
    return streams


def _composites(
    model: Adapter, sites: list[RouterSite], units: int, tokens: int
) -> dict[RouterSite, Stream]:
    """By site, the sums of the two-stage layers of which the first stage is among the sites."""
    streams: dict[RouterSite, Stream] = {}
    for first in sites:
        second = composed(model, first)
        if second is not None:
            streams[first] = CompositeStream(model, first, second, units, tokens)
            if second in sites:
                streams[second] = SecondStage(streams[first])
    return streams


def _tables(
    model: Adapter,
    wanted: list[str],
    streams: dict[RouterSite, dict[str, Stream]],
    labels: Labels,
    units: int,
    packs: int,
    confidence: float,
) -> Overlap:
    frames: dict[str, list[pd.DataFrame]] = {table: [] for table in TABLES}
    unit = "batch of documents" if packs <= MAX_UNITS else "batches of documents"
    for site, own in streams.items():
        sums = {kind: stream.sums() for kind, stream in own.items()}
        for name in wanted:
            metric = METRICS[name]
            if metric.kind == "weights":
                weights = ExpertWeights.of(model, site)
                found, how = _of_weights(metric, weights), ("none: parameters", 0)
            elif metric.kind in sums:
                if name == "transition" and "transition" not in sums["usage"]:
                    continue  # the first site has none before it
                if metric.table == "sites" and isinstance(own[metric.kind], SecondStage):
                    continue  # of the layer, which stands with its first stage
                found = estimate(metric, sums[metric.kind], confidence)
                how = (unit, units) if metric.units else ("none: classes are kept as one total", 0)
            else:
                continue  # a composite, and this is no layer of two stages
            # A transition is from all experts of the site before, however many they are.
            shared = name != "transition" and found.value.shape[:1] > (site.num_experts,)
            domains = labels.domains if name == "domain_specialization" else ()
            frames[metric.table].append(
                rows_of(model, site, name, metric.table, found, *how, shared, domains)
            )
    return Overlap(
        **{t: pd.concat(f, ignore_index=True) if f else _empty(t) for t, f in frames.items()}
    )


def _of_weights(metric: Metric, weights: ExpertWeights) -> Estimate:
    """Of parameters alone: there is nothing to resample."""
    value = metric.of(weights).double().cpu().numpy()
    nothing = np.full(value.shape, np.nan)
    if metric.null is None:
        return Estimate(value, nothing, nothing, nothing)
    null = metric.null(weights).double().cpu().numpy()
    return Estimate(value, nothing, nothing, np.broadcast_to(null, value.shape))


def _empty(table: str) -> pd.DataFrame:
    return pd.DataFrame(columns=[*KEYS, *INDEX[table], *VALUES])
