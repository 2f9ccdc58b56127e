"""What the experts of a model have in common, measured on documents: streams over one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from analysis.adapters.base import Adapter, RoutedFlow, State
from analysis.conditions import Where
from analysis.losses import loss_gradient
from analysis.overlap import METRICS, ExpertWeights, Overlap
from analysis.overlap.base import (
    MAX_UNITS,
    PROBES,
    TABLES,
    Estimate,
    Metric,
    Probe,
    Stream,
    estimate,
)
from analysis.overlap.composite import CompositeStream
from analysis.overlap.outputs import OutputStream
from analysis.overlap.substitution import SubstitutionStream
from analysis.overlap.tables import INDEX, KEYS, VALUES, rows_of
from analysis.overlap.usage import UsageStream
from analysis.stats.bootstrap import check_resampling
from analysis.sweep import routed_adapter
from cartmoe.config import check_choice, check_whole
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

SHUFFLES = 8  # of labels over documents, for nulls
VOCABULARY = 2048  # token ids told apart, the most frequent ones; all others are one
DAMAGE = "function"  # the kind that is itself damage, and is measured only where it is named


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
    batch_size  sequences at a time. Batches are made of whole documents, and are what the jackknife
                leaves out (with more than 32 of them, several at once)
    minibatch   tokens of which one HSIC of debiased CKA is made
    skip_first  leave out the first token of each sequence, on which all attention dwells

    Routing is that of the real run, as the experts were given it. Memory does not grow with the
    documents. Raises `ValueError` for a dense model, unknown names, metrics that do not fit the
    model, no documents, and numbers out of range.
    """
    model = routed_adapter(model)
    chosen = sites_of(model, sites)
    wanted = _wanted(model, chosen, metrics)
    check_choice("probe", probe, PROBES)
    check_resampling(confidence, 1)
    for name, number in {"batch_size": batch_size, "minibatch": minibatch}.items():
        check_whole(name, number, 4 if name == "minibatch" else 1)
    if not len(docs):
        raise ValueError("docs has no sequence")
    packs = list(packs_of(docs, batch_size, seed))
    units = min(len(packs), MAX_UNITS)
    labels = Labels.of(docs, seed)
    kinds = {METRICS[name].kind for name in wanted}
    options = dict(probe=probe, minibatch=minibatch, seed=seed)
    streams = {site: _streams(model, site, kinds, units, labels, options) for site in chosen}
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


def packs_of(docs: Sequences, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of sequences: whole documents in a random order, until there are `batch_size`."""
    by_document: dict[str, list[int]] = {}
    for number, document in enumerate(docs.document_id):
        by_document.setdefault(document, []).append(number)
    documents = list(by_document.values())
    pack: list[int] = []
    for at in np.random.default_rng(seed).permutation(len(documents)):
        if pack and len(pack) + len(documents[at]) > batch_size:
            yield pack
            pack = []
        pack = pack + documents[at]
    yield pack


@dataclass(frozen=True)
class Labels:
    """What tokens are, and what they would be if documents had been shuffled.

    domains    names, in order of their numbers
    class_V    by token id the number of its class: the most frequent ones, and all others
    other_RS   for each sequence, one of another document
    """

    domains: list[str]
    domain_S: Tensor
    class_V: Tensor
    num_classes: int
    other_RS: Tensor

    @classmethod
    def of(cls, docs: Sequences, seed: int) -> Labels:
        """Of these documents."""
        domains = sorted(set(docs.domain))
        domain_S = torch.tensor([domains.index(domain) for domain in docs.domain])
        counts_V = torch.bincount(docs.tokens_SL.flatten())
        frequent = counts_V.argsort(descending=True, stable=True)[:VOCABULARY]
        class_V = torch.full_like(counts_V, len(frequent))
        class_V[frequent] = torch.arange(len(frequent))
        num_classes = len(frequent) + (len(counts_V) > len(frequent))
        rng = np.random.default_rng([seed, 1])
        document_S = np.unique(docs.document_id, return_inverse=True)[1]
        other_RS = np.stack([_shuffled(document_S, rng) for _ in range(SHUFFLES)])
        return cls(domains, domain_S, class_V, num_classes, torch.from_numpy(other_RS))


def _shuffled(document_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each sequence one of the document that takes the place of its own in a shuffle."""
    documents = document_S.max() + 1
    place_of = rng.permutation(documents)
    rows = [np.flatnonzero(document_S == d) for d in range(documents)]
    other_S = np.empty_like(document_S)
    for document, own in enumerate(rows):
        others = rows[place_of[document]]
        other_S[own] = others[np.arange(len(own)) % len(others)]
    return other_S


@dataclass
class Probes:
    """One batch, as the sites of a model see it.

    key   of the random order of its tokens
    """

    model: Adapter
    docs: Sequences
    rows: list[int]
    labels: Labels
    skip_first: bool
    key: tuple[int, ...]

    def of(
        self, sites: Sequence[RouterSite], unit: int, gradients: bool
    ) -> Iterator[tuple[RouterSite, Probe]]:
        """A `Probe` for each site. Raises `FloatingPointError` if logits are not finite."""
        batch = self.docs.take(self.rows).to(self.model.device)
        flows, streams, gradient_of = _run(self.model, batch, gradients)
        counts_SL = batch.targets_SL != IGNORE
        if self.skip_first:
            counts_SL[:, 0] = False
        counted = counts_SL.flatten().nonzero()[:, 0]
        order = torch.from_numpy(np.random.default_rng(self.key).permutation(len(counted)))
        counted = counted[order.to(counted.device)]
        tokens_T, domain_T = self._tokens(torch.tensor(self.rows), counted)
        others = [self._tokens(other_S, counted) for other_S in self.labels.other_RS[:, self.rows]]
        other_tokens_RT, other_domain_RT = map(torch.stack, zip(*others, strict=True))
        before: Routing | None = None
        for site in self.model.sites():
            x_TD, routing = flows[site].x_TD.detach(), flows[site].routing
            routing = Routing(*(t.detach()[counted] for t in routing))
            if site in sites:
                yield (
                    site,
                    Probe(
                        unit,
                        x_TD[counted],
                        routing,
                        tokens_T,
                        domain_T,
                        other_tokens_RT,
                        other_domain_RT,
                        before,
                        streams[site][counted],
                        gradient_of[site][counted] if gradients else None,
                    ),
                )
            before = routing

    def _tokens(self, rows_S: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Token classes and domains of these sequences at the counted places; a sequence that is
        shorter is begun again."""
        L = self.docs.tokens_SL.shape[1]
        length_S1 = (self.docs.targets_SL[rows_S] != IGNORE).sum(-1, keepdim=True)
        place_SL = torch.arange(L)[None] % length_S1.clamp(min=1)
        tokens_SL = self.docs.tokens_SL[rows_S].gather(-1, place_SL)
        domain_SL = self.labels.domain_S[rows_S, None].expand(-1, L)
        at = counted.cpu()
        return self.labels.class_V[tokens_SL.flatten()[at]], domain_SL.flatten()[at]


def _run(
    model: Adapter, batch: Sequences, gradients: bool
) -> tuple[dict[RouterSite, RoutedFlow], dict[RouterSite, Tensor], dict[RouterSite, Tensor]]:
    """By site what went through the experts, the residual stream that entered its segment, and,
    with gradients, dloss/d(routed output)."""
    entered: dict[RouterSite, Tensor] = {}
    state = State(None, batch.tokens_SL)
    with torch.set_grad_enabled(gradients), model.watch_experts() as flows:
        for segment in model.segments():
            if gradients and state.hidden_BLD is not None and not state.hidden_BLD.requires_grad:
                state = state._replace(hidden_BLD=state.hidden_BLD.requires_grad_())
            for site in segment.sites:
                entered[site] = state.hidden_BLD.detach().flatten(0, 1)
            state = segment.run(state)
        model.check()
    flows = dict(flows)
    if not gradients:
        return flows, entered, {}
    hidden_TD = state.hidden_BLD.flatten(0, 1)
    end_TD = loss_gradient(model, hidden_TD.detach(), batch.targets_SL.flatten())
    outputs = [flow.output_TD for flow in flows.values()]
    found = torch.autograd.grad(hidden_TD, outputs, end_TD)
    return flows, entered, dict(zip(flows, found, strict=True))


def sites_of(model: Adapter, sites: Any) -> list[RouterSite]:
    """The routers that were asked for, as `measure_overlap` takes them; `ValueError` for none."""
    if sites is None:
        return model.sites()
    asked = sites if isinstance(sites, list | tuple) else [sites]
    places = [Where.parse(site) for site in asked]
    chosen = [site for site in model.sites() if any(place(site) for place in places)]
    if not chosen or any(p.positions or p.tokens or not any(map(p, chosen)) for p in places):
        have = ", ".join(f"'{Where.parse(site)}'" for site in model.sites())
        raise ValueError(f"sites is {sites!r}; it must select routers, all their tokens: {have}")
    return chosen


def _wanted(model: Adapter, sites: list[RouterSite], metrics: str | Sequence[str] | None):
    """Names of the metrics to measure, each once."""
    fitting = {name: m for name, m in METRICS.items() if fits(model, sites, name, m)}
    if metrics is None:
        return [name for name, metric in fitting.items() if metric.kind != DAMAGE]
    names = list(dict.fromkeys([metrics] if isinstance(metrics, str) else metrics))
    for name in names:
        check_choice("metric", name, METRICS)
        check_choice(f"metric for {model.name}", name, fitting)
    if not names:
        raise ValueError(f"metrics is {metrics!r}; name some of {', '.join(METRICS)}")
    return names


def fits(model: Adapter, sites: list[RouterSite], name: str, metric: Metric) -> bool:
    """Whether the metric can be measured at these sites."""
    if metric.kind == "composite":
        return any(composed(model, site) for site in sites)
    return name != "router_cosine" or all(model.router_rows(site) is not None for site in sites)


def composed(model: Adapter, site: RouterSite) -> RouterSite | None:
    """The second stage of the two-stage layer of which this site is the first; None elsewhere."""
    layer = [other for other in model.sites() if other.layer == site.layer]
    return layer[1] if len(layer) == 2 and layer[0] == site else None


def _streams(
    model: Adapter, site: RouterSite, kinds: set[str], units: int, labels: Labels, options: dict
) -> dict[str, Stream]:
    """By kind, what sums over this site's tokens."""
    streams: dict[str, Stream] = {}
    if "usage" in kinds:
        streams["usage"] = UsageStream(site, units, labels.num_classes, len(labels.domains))
    if "outputs" in kinds:
        streams["outputs"] = OutputStream(model, site, units, **options)
    if DAMAGE in kinds:
        streams[DAMAGE] = SubstitutionStream(model, site, units)
    second = composed(model, site)
    if "composite" in kinds and second is not None:
        streams["composite"] = CompositeStream(model, site, second, units)
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
                found = estimate(metric, sums[metric.kind], confidence)
                how = (unit, units) if metric.units else ("none: classes are kept as one total", 0)
            else:
                continue  # composites stand with the first stage alone
            shared = found.value.ndim > 0 and found.value.shape[0] > site.num_experts
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
