"""Documents as the sites of a model see them: batches of whole documents, labels, one pass.

Shapes: S sequences, L length, T tokens, V vocabulary, R shuffles, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from analysis.adapters import Adapter, RoutedFlow, State, Watch, batches, clean_routing
from analysis.measure import loss_gradient
from analysis.overlap.metrics import Probe, usage
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing

SHUFFLES = 8  # of labels over documents, for nulls
VOCABULARY = 2048  # token ids told apart, the most frequent ones; all others are one


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
        domains = sorted(set(docs.domain))
        domain_S = torch.tensor([domains.index(domain) for domain in docs.domain])
        counts_V = torch.bincount(docs.tokens_SL.flatten())
        frequent = counts_V.argsort(descending=True, stable=True)[:VOCABULARY]
        class_V = torch.full_like(counts_V, len(frequent))
        class_V[frequent] = torch.arange(len(frequent))
        num_classes = len(frequent) + (len(counts_V) > len(frequent))
        rng = np.random.default_rng([seed, 1])
        document_S = np.unique(docs.document_id, return_inverse=True)[1]
        shuffles = SHUFFLES if document_S.any() else 0
        others = [_shuffled(document_S, rng) for _ in range(shuffles)]
        other_RS = torch.from_numpy(np.array(others, np.int64).reshape(-1, len(docs)))
        return cls(domains, domain_S, class_V, num_classes, other_RS)


def _shuffled(document_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A permutation of the sequences in which documents, in one piece each, change places."""
    rows = [np.flatnonzero(document_S == d) for d in range(document_S.max() + 1)]
    other_S = np.empty_like(document_S)
    order = rng.permutation(len(rows))
    other_S[np.concatenate(rows)] = np.concatenate([rows[d] for d in order])
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
        rows_S, L = torch.tensor(self.rows), counts_SL.shape[1]
        own_SL = torch.arange(L).expand(len(rows_S), L)
        tokens_T, domain_T = self._labels(rows_S, own_SL, counted)
        others_RS = self.labels.other_RS[:, self.rows]
        other_tokens_RT, other_domain_RT = self._labels(others_RS, self._places(others_RS), counted)
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

    def _places(self, rows_S: Tensor) -> Tensor:
        """(..., S, L) the places with a target of these sequences, (..., S), and from their end on
        the same once more."""
        targets_SL = self.docs.targets_SL[rows_S]
        empty_SL = targets_SL == IGNORE
        first_SL = empty_SL.byte().argsort(dim=-1, stable=True)
        length_S1 = (~empty_SL).sum(-1, keepdim=True)
        return first_SL.gather(-1, torch.arange(targets_SL.shape[-1]) % length_S1.clamp(min=1))

    def _labels(self, rows_S: Tensor, place_SL: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Token classes and domains, (..., T), of these sequences, (..., S), at places of theirs,
        (..., S, L), that stand where the counted ones are."""
        tokens_SL = self.docs.tokens_SL[rows_S].gather(-1, place_SL)
        domain_SL = self.labels.domain_S[rows_S, None].expand_as(tokens_SL)
        at = counted.cpu()
        tokens_T, domain_T = (x_SL.flatten(-2)[..., at] for x_SL in (tokens_SL, domain_SL))
        return self.labels.class_V[tokens_T], domain_T


def _run(
    model: Adapter, batch: Sequences, gradients: bool
) -> tuple[dict[RouterSite, RoutedFlow], dict[RouterSite, Tensor], dict[RouterSite, Tensor]]:
    """By site what went through the experts, the residual stream that entered its segment, and,
    with gradients, dloss/d(routed output)."""
    entered: dict[RouterSite, Tensor] = {}
    state, flows = State(None, batch.tokens_SL), Watch()
    with torch.set_grad_enabled(gradients), model.hooked(experts=flows):
        for segment in model.segments():
            if gradients and state.hidden_BLD is not None and not state.hidden_BLD.requires_grad:
                state = state._replace(hidden_BLD=state.hidden_BLD.requires_grad_())
            for site in segment.sites:
                entered[site] = state.hidden_BLD.detach().flatten(0, 1)
            state = segment.run(state)
    hidden_TD = state.hidden_BLD.flatten(0, 1)
    if not gradients:
        return flows, entered, {}
    end_TD = loss_gradient(model, hidden_TD.detach(), batch.targets_SL.flatten())
    outputs = [flow.output_TD for flow in flows.values()]
    found = torch.autograd.grad(hidden_TD, outputs, end_TD)
    return flows, entered, dict(zip(flows, found, strict=True))


def routed_tokens(model: Adapter, docs: Sequences, batch_size: int) -> dict[RouterSite, np.ndarray]:
    """By site (S, E): tokens with a target, of each sequence, that use each expert."""
    counts: dict[RouterSite, list[np.ndarray]] = {site: [] for site in model.sites()}
    for batch in batches(model, docs, batch_size):
        has_target_SL1 = (batch.targets_SL != IGNORE)[..., None]
        for site, routing in clean_routing(model, batch.tokens_SL).items():
            used_TE = usage.used_mask(routing.ids_TK, site.num_experts, routing.weights_TK)
            used_SLE = used_TE.unflatten(0, has_target_SL1.shape[:2]) & has_target_SL1
            counts[site].append(used_SLE.sum(1).cpu().numpy())
    return {site: np.concatenate(parts) for site, parts in counts.items()}
