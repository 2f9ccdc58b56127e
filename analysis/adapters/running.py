"""Running a model under study by its segments, and what its decisions are as vectors.

Shapes: B batch, L length, T = B * L tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analysis.adapters.base import Adapter, Experts, Segment, State
from cartmoe.config import check_whole
from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


def check_documents(docs: Sequences, *models: Adapter, name: str = "docs") -> None:
    """Raise `ValueError` unless these are sequences of documents, at least one, in tokens that all
    of these models know."""
    if not isinstance(docs, Sequences):
        raise ValueError(f"{name} is a {type(docs).__name__}; give what analysis.documents returns")
    if not len(docs):
        raise ValueError(f"{name} has no sequence")
    largest = int(docs.tokens_SL.max())
    for model in models:
        if largest >= model.vocab_size:
            raise ValueError(
                f"{name} has token {largest}, and {model.name} a vocabulary of {model.vocab_size}: "
                "take those of analysis.documents(corpus, model), which are in its own tokens"
            )


def needs_gradients(what: str, model: Adapter) -> None:
    """Raise `ValueError` for what goes back through the whole model, where that is streamed."""
    if getattr(model, "streamed", False):
        raise ValueError(
            f"{what} needs gradients through the whole model, of which {model.name} has a layer at "
            "a time in memory; load it whole"
        )


def num_batches(docs: Sequences, batch_size: int) -> int:
    """How many there are; `ValueError` for a batch_size that is no whole number above 0."""
    return -(-len(docs) // check_whole("batch_size", batch_size, 1))


def batches(model: Adapter, docs: Sequences, batch_size: int) -> Iterator[Sequences]:
    """So many sequences at a time, where the model is. Raises as `num_batches`."""
    batch_size = check_whole("batch_size", batch_size, 1)
    for first in range(0, len(docs), batch_size):
        yield docs[first : first + batch_size].to(model.device)


def steps(segments: Sequence[Segment], state: State) -> Iterator[tuple[Segment, State, State]]:
    """One segment after the other: (it, the state before, the state after)."""
    for segment in segments:
        before, state = state, segment.run(state)
        yield segment, before, state


def run(segments: Sequence[Segment], start: State | Tensor) -> State:
    """The state behind these segments, from one before them or from tokens (B, L)."""
    state = State(None, start) if isinstance(start, Tensor) else start
    for segment in segments:
        state = segment.run(state)
    return state


def clean_routing(model: Adapter, tokens_BL: Tensor) -> dict[RouterSite, Routing]:
    """What every router decides on these tokens when nobody disturbs it, in order of depth."""
    with torch.no_grad():
        return dict(zip(model.sites(), run(model.segments(), tokens_BL).decisions, strict=True))


class DenseRouting:
    """A decision as vectors over the experts: weights (T, E), who is used (T, E), how many (T,)."""

    def __init__(self, routing: Routing):
        zeros_TE = torch.zeros_like(routing.scores_TE, dtype=routing.weights_TK.dtype)
        self.weights_TE = zeros_TE.scatter_add_(-1, routing.ids_TK, routing.weights_TK)
        # Weights are never negative: an expert is used exactly if its summed weight is not 0.
        self.used_TE = self.weights_TE != 0
        self.count_T = self.used_TE.sum(-1)


class RoutedFlow(NamedTuple):
    """What went through one site's routed experts in a forward."""

    x_TD: Tensor
    routing: Routing
    output_TD: Tensor  # part of the graph, so a loss has a gradient by it


class Watch(dict[RouterSite, RoutedFlow]):
    """By site of the last forward, what went through the experts: for `hooked(experts=watch)`."""

    def __call__(self, x_TD: Tensor, routing: Routing, site: RouterSite, own: Experts) -> Tensor:
        """What the experts themselves compute."""
        self[site] = RoutedFlow(x_TD, routing, own(x_TD, routing))
        return self[site].output_TD


def branches(model: Adapter, site: RouterSite, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(share, rest), (T, D) each: `combine` is the map routed -> share * routed + rest.

    So rest is its value at 0 and share its derivative; a shared expert runs once.
    """
    routed_TD = torch.zeros_like(x_TD).requires_grad_()
    with torch.enable_grad():
        rest_TD = model.combine(site, x_TD, routed_TD)
        (share_TD,) = torch.autograd.grad(rest_TD.sum(), routed_TD)
    return share_TD, rest_TD.detach()
