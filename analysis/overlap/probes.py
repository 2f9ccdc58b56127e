"""Documents as the sites of a model see them: batches of whole documents, labels, one pass.

Shapes: S sequences, L length, T tokens, V vocabulary, R shuffles, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import Adapter, Segment, State, Watch, needs_gradients, steps
from analysis.measure import check_finite, loss_gradient
from analysis.overlap.metrics import Probe
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

SHUFFLES = 8  # of labels over documents, for nulls
VOCABULARY = 2048  # token ids told apart, the most frequent ones; all others are one


def packs_of(docs: Sequences, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of sequences: whole documents in a random order, until there are `batch_size`."""
    numbers = pd.Series(range(len(docs)))
    documents = numbers.groupby(list(docs.document_id), sort=False).agg(list).to_list()
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
    other_RS   for each sequence, the one whose labels take the place of its own: R permutations, of
               a single document none, as they would leave everything as it is
    """

    domains: list[str]
    domain_S: Tensor
    class_V: Tensor
    num_classes: int
    other_RS: Tensor

    @classmethod
    def of(cls, docs: Sequences, seed: int) -> Labels:
        """Of these documents."""
        domains, domain_S = np.unique(docs.domain, return_inverse=True)
        counts_V = torch.bincount(docs.tokens_SL.flatten())
        frequent = counts_V.argsort(descending=True, stable=True)[:VOCABULARY]
        class_V = torch.full_like(counts_V, len(frequent))
        class_V[frequent] = torch.arange(len(frequent))
        rng = np.random.default_rng([seed, 1])
        document_S = np.unique(docs.document_id, return_inverse=True)[1]
        shuffles = SHUFFLES if document_S.any() else 0
        others = [_shuffled(document_S, rng) for _ in range(shuffles)]
        other_RS = torch.from_numpy(np.array(others, np.int64).reshape(-1, len(docs)))
        num_classes = int(class_V.max()) + 1
        return cls(domains.tolist(), torch.from_numpy(domain_S), class_V, num_classes, other_RS)


def _shuffled(document_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the sequences in which documents, in one piece each, change places."""
    rows = [np.flatnonzero(document_S == d) for d in range(document_S.max() + 1)]
    other_S = np.empty_like(document_S)
    order = rng.permutation(len(rows))
    other_S[np.concatenate(rows)] = np.concatenate([rows[d] for d in order])
    return other_S


class Seen(NamedTuple):
    """What one site saw of a batch, and dloss/d(routed output) where it was asked for."""

    x_TD: Tensor
    routing: Routing
    stream_TD: Tensor
    gradient_TD: Tensor | None


@dataclass
class Probes:
    """Documents as these sites of a model see them.

    skip_first   the first token of a sequence does not count
    gradients    of the loss by what the routed experts put out
    """

    model: Adapter
    docs: Sequences
    sites: Sequence[RouterSite]
    labels: Labels
    skip_first: bool = False
    gradients: bool = False

    def of(
        self, rows: list[int], unit: int, key: tuple[int, ...]
    ) -> Iterator[tuple[RouterSite, Probe]]:
        """Of a batch of these sequences, a `Probe` for each site; `key` of the random order of its
        tokens. Raises `FloatingPointError` if logits are not finite."""
        reading = Reading(self, rows, unit, key)
        seen = self.look(reading.batch, reading.counts_SL)
        for site in self.model.sites():
            yield from reading.probe(site, seen[site])

    def look(self, batch: Sequences, counts_SL: Tensor) -> dict[RouterSite, Seen]:
        """One forward, and with gradients one backward. Which tokens count stays as it is."""
        if self.gradients:
            needs_gradients("substitution", self.model)
        entered: dict[RouterSite, Tensor] = {}
        flows, start = Watch(), State(None, batch.tokens_SL)
        with torch.set_grad_enabled(self.gradients), self.model.hooked(experts=flows):
            for segment, before, after in steps(self.model.segments(), start):
                for site in segment.sites:
                    entered[site] = before.hidden_BLD.detach().flatten(0, 1)
                after.hidden_BLD.requires_grad_(self.gradients)
            hidden_TD = after.hidden_BLD.flatten(0, 1)
        found: Sequence[Tensor | None] = [None] * len(flows)
        if self.gradients:
            end_TD = loss_gradient(self.model, hidden_TD.detach(), batch.targets_SL.flatten())
            outputs = [flow.output_TD for flow in flows.values()]
            found = torch.autograd.grad(hidden_TD, outputs, end_TD)
        return {
            site: Seen(flow.x_TD, flow.routing, entered[site], gradient_TD)
            for (site, flow), gradient_TD in zip(flows.items(), found, strict=True)
        }

    def check(self) -> None:
        """Behind the last batch; there is nothing to say of a model."""

    def _places(self, rows_S: Tensor) -> Tensor:
        """(..., S, L) the places with a target of these sequences, (..., S), and from their end on
        the same once more."""
        empty_SL = self.docs.targets_SL[rows_S] == IGNORE
        first_SL = empty_SL.byte().argsort(dim=-1, stable=True)
        length_S1 = (~empty_SL).sum(-1, keepdim=True)
        return first_SL.gather(-1, torch.arange(empty_SL.shape[-1]) % length_S1.clamp(min=1))

    def _labels(self, rows_S: Tensor, place_SL: Tensor, at: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token classes and domains, (..., T), of these sequences, (..., S), at places of theirs,
        (..., S, L), that stand where the counted ones are."""
        tokens_SL = self.docs.tokens_SL[rows_S].gather(-1, place_SL)
        domain_SL = self.labels.domain_S[rows_S, None].expand_as(tokens_SL)
        tokens_T, domain_T = (x_SL.flatten(-2)[..., at] for x_SL in (tokens_SL, domain_SL))
        return self.labels.class_V[tokens_T], domain_T


class Reading:
    """A batch of documents on its way through a model, whose sites see it one after the other.

    counts_SL   which of its tokens count, until one of its probes is made
    before      the decision at the last site, of those that do
    """

    def __init__(self, probes: Probes, rows: list[int], unit: int, key: tuple[int, ...]):
        self.probes, self.rows, self.unit, self.key = probes, rows, unit, key
        self.batch = probes.docs.take(rows).to(probes.model.device)
        self.counts_SL = self.batch.targets_SL != IGNORE
        if probes.skip_first:
            self.counts_SL[:, 0] = False
        self.hidden_BLD: Any = None  # a Tensor behind the first segment
        self.before: Routing | None = None

    @cached_property
    def at(self) -> np.ndarray:
        """Numbers of the tokens that count, in a random order."""
        counted = np.flatnonzero(self.counts_SL.cpu())
        return np.random.default_rng(self.key).permutation(counted)

    @cached_property
    def labels(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Their classes and domains, and those of other documents at their places."""
        probes, at = self.probes, self.at
        own_SL = torch.arange(self.counts_SL.shape[1]).expand_as(self.counts_SL)
        others_RS = probes.labels.other_RS[:, self.rows]
        own = probes._labels(torch.tensor(self.rows), own_SL, at)
        return *own, *probes._labels(others_RS, probes._places(others_RS), at)

    def step(self, segment: Segment) -> Iterator[tuple[RouterSite, Probe]]:
        """Through one segment: a `Probe` for each of its sites."""
        model, flows, before = self.probes.model, Watch(), self.hidden_BLD
        inside = set(segment.sites)
        hooked = model.hooked(experts=flows, where=inside.__contains__) if inside else nullcontext()
        with torch.no_grad(), hooked:
            after = segment.run(State(before, self.batch.tokens_SL))
        self.hidden_BLD = after.hidden_BLD
        for site, flow in flows.items():
            check_finite(site, flow.routing)
            stream_TD = before.flatten(0, 1)
            yield from self.probe(site, Seen(flow.x_TD, flow.routing, stream_TD, None))

    def probe(self, site: RouterSite, seen: Seen) -> Iterator[tuple[RouterSite, Probe]]:
        """The site's, if it is asked for; sites come in order."""
        counted = torch.from_numpy(self.at).to(self.probes.model.device)
        x_TD, routing, stream_TD, gradient_TD = seen
        routing = Routing(*(t.detach()[counted] for t in routing))
        if site in self.probes.sites:
            x_TD, stream_TD = x_TD.detach()[counted], stream_TD[counted]
            gradient_TD = gradient_TD[counted] if gradient_TD is not None else None
            args = *self.labels, self.before, stream_TD, gradient_TD
            yield site, Probe(self.unit, x_TD, routing, *args)
        self.before = routing
