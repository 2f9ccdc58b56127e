"""Documents as the sites of a model see them: batches of whole documents, labels, one pass.

Shapes: S sequences, L length, T tokens, V vocabulary, R shuffles, D model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, State, Watch, batches, clean_routing, steps
from analysis.measure import loss_gradient
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
        batch = self.docs.take(rows).to(self.model.device)
        counts_SL = batch.targets_SL != IGNORE
        if self.skip_first:
            counts_SL[:, 0] = False
        seen = self.look(batch, counts_SL)
        at = np.random.default_rng(key).permutation(np.flatnonzero(counts_SL.cpu()))
        counted = torch.from_numpy(at).to(self.model.device)
        own_SL = torch.arange(counts_SL.shape[1]).expand_as(counts_SL)
        others_RS = self.labels.other_RS[:, rows]
        own = self._labels(torch.tensor(rows), own_SL, at)
        others = self._labels(others_RS, self._places(others_RS), at)
        before: Routing | None = None
        for site in self.model.sites():
            x_TD, routing, stream_TD, gradient_TD = seen[site]
            routing = Routing(*(t.detach()[counted] for t in routing))
            if site in self.sites:
                x_TD, stream_TD = x_TD.detach()[counted], stream_TD[counted]
                gradient_TD = gradient_TD[counted] if gradient_TD is not None else None
                labels = *own, *others
                yield site, Probe(unit, x_TD, routing, *labels, before, stream_TD, gradient_TD)
            before = routing

    def look(self, batch: Sequences, counts_SL: Tensor) -> dict[RouterSite, Seen]:
        """One forward, and with gradients one backward. Which tokens count stays as it is."""
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


def decisions(
    model: Adapter, batch: Sequences, sites: Sequence[RouterSite]
) -> dict[RouterSite, Routing]:
    """Those of the clean run at these sites, of the tokens that have a target."""
    counts_T = (batch.targets_SL != IGNORE).flatten()
    routed = clean_routing(model, batch.tokens_SL.to(model.device))
    return {site: Routing(*(t[counts_T] for t in routed[site])) for site in sites}


def of_tokens(batch: Sequences, number_of: Mapping[str, int]) -> Tensor:
    """(T,) the number of its document, for each token that has a target."""
    number_S = torch.tensor([number_of[document] for document in batch.document_id])
    return number_S[(batch.targets_SL != IGNORE).nonzero()[:, 0].cpu()]


def routed_tokens(model: Adapter, docs: Sequences, batch_size: int) -> dict[RouterSite, np.ndarray]:
    """By site (S, E): tokens with a target, of each sequence, that use each expert."""
    parts: dict[RouterSite, list[Tensor]] = {site: [] for site in model.sites()}
    for batch in batches(model, docs, batch_size):
        counts_SL = batch.targets_SL != IGNORE
        for site, routing in clean_routing(model, batch.tokens_SL).items():
            used_SLE = DenseRouting(routing).used_TE.unflatten(0, counts_SL.shape)
            parts[site].append((used_SLE & counts_SL[..., None]).sum(1).double().cpu())
    return {site: torch.cat(counts_SE).numpy() for site, counts_SE in parts.items()}


def by_document(docs: Sequences, values_CS: Iterable[np.ndarray]) -> np.ndarray:
    """(C, D) sums over the sequences of each document, in order of their ids."""
    document_S = np.unique(docs.document_id, return_inverse=True)[1]
    return np.stack([np.bincount(document_S, weights=values_S) for values_S in values_CS])
