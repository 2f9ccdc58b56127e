"""Which tokens of documents the experts of a clean run have, counted by document.

Shapes: S sequences, L length, T tokens, E experts, C columns, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from analysis.adapters import Adapter, DenseRouting, batches, clean_routing
from cartmoe.data import IGNORE, Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


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
