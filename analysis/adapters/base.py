"""What a model under study must offer, whoever made it.

Shapes: B batch, L length, T = B * L tokens, D model, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cartmoe.data import Sequences
from cartmoe.hooks import RouterSite
from cartmoe.routing import Router, Routing


class State(NamedTuple):
    """The stream between two segments. Segments make new states and change none."""

    hidden_BLD: Tensor | None  # None before the embedding
    tokens_BL: Tensor
    decisions: tuple[Routing, ...] = ()  # of the sites passed so far, in order


class Segment(NamedTuple):
    """One step of the model, state -> state, and the sites whose routers run in it."""

    name: str
    run: Callable[[State], State]
    sites: tuple[RouterSite, ...] = ()


EditFunction = Callable[[Routing, Router, RouterSite, Tensor], Routing | None]
# (what the stage adds to the stream (T, D), what enters its router (T, D), decision, site).
OutputFunction = Callable[[Tensor, Tensor, Routing, RouterSite], Tensor | None]
# (what enters the routed experts (T, D), decision) -> the weighted sum of their outputs (T, D);
# None: as the experts themselves compute it.
ExpertsFunction = Callable[[Tensor, Routing], Tensor | None]


class RoutedFlow(NamedTuple):
    """What went through one site's routed experts in a forward with gradients."""

    x_TD: Tensor
    routing: Routing
    output_TD: Tensor  # part of the graph, so the loss has a gradient by it


class Adapter(Protocol):
    """A model under study.

    name        what tables and figures call it;  family and train_seed likewise
    identity    SHA-256 of its weights' files, or of its tensors for an object in memory
    tokenizer   with `encode` and `num_bytes` (see cartmoe.tokenizers)
    device      where its weights are
    width       D of its residual stream
    vocab_size  V
    """

    name: str
    family: str
    train_seed: int
    identity: str
    tokenizer: Any
    device: torch.device
    width: int
    vocab_size: int

    def sites(self) -> list[RouterSite]:
        """Every router in order of depth."""
        ...

    def segments(self) -> list[Segment]:
        """Ordered steps whose composition is the model up to, not including, the head."""
        ...

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32: the head, on any rows of the last segment's hidden states."""
        ...

    def check(self) -> None:
        """Raise `FloatingPointError` if router logits were not finite in the last forward."""
        ...

    def edit(
        self, fn: EditFunction, where: Callable[[RouterSite], bool] | None = None
    ) -> AbstractContextManager:
        """Within the block, fn(routing, router, site, x_TD) may replace each decision."""
        ...

    def edit_output(
        self, fn: OutputFunction, where: Callable[[RouterSite], bool] | None = None
    ) -> AbstractContextManager:
        """Within the block, fn(output_TD, x_TD, routing, site) may replace what a routed stage
        adds to the residual stream (shared expert included)."""
        ...

    def stage_output(self, site: RouterSite, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) that the stage would add to the residual stream under this decision."""
        ...

    def replace_experts(self, site: RouterSite, fn: ExpertsFunction) -> AbstractContextManager:
        """Within the block, fn may compute the routed part of the site in the experts' place."""
        ...

    def watch_experts(self) -> AbstractContextManager[dict[RouterSite, RoutedFlow]]:
        """Within the block, by site of the last forward: what went through the experts."""
        ...

    def router(self, site: RouterSite) -> Router:
        """The site's router."""
        ...

    def gate(self, site: RouterSite) -> Callable[[Tensor, Tensor], Tensor]:
        """(x_TD, token_ids_T) -> logits_TE, whatever hooks there are on the router."""
        ...

    def on_forward(self, fn: Callable[[Tensor], None]) -> AbstractContextManager:
        """Within the block, fn(tokens_BL) is called before each forward of the whole model."""
        ...

    def watch_branches(self) -> AbstractContextManager[dict[RouterSite, tuple[Tensor, Tensor]]]:
        """Within the block, by site of the last forward: the routed branch's share c_0 (T,), and
        ||c_0 * routed|| (T,)."""
        ...

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """gate (E, F, D), up (E, F, D) and down (E, D, F) projections."""
        ...

    def expert_outputs(
        self, site: RouterSite, x_TD: Tensor, ids: list[int] | None = None
    ) -> Tensor:
        """(E, T, D) outputs of all experts (or of those ids) on the same tokens, unweighted."""
        ...

    def shared_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor] | None:
        """gate (F, D), up (F, D) and down (D, F) of the site's shared expert, as it stands in the
        stage's output before the mix; None where there is none. F may differ from the experts'."""
        ...

    def router_rows(self, site: RouterSite) -> Tensor | None:
        """(E, D): what logits are inner products with; None where the gate is no linear map."""
        ...

    def stage_input(self, site: RouterSite, stream_TD: Tensor) -> Tensor:
        """(T, D): what enters the site's router and experts when this is the residual stream."""
        ...

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D) that the stage adds to the residual stream when its routed part gives this."""
        ...

    def site_facts(self, site: RouterSite) -> dict[str, float]:
        """What tables print beside a site: top_k, renormalize, num_experts."""
        ...


@singledispatch
def as_adapter(model: object) -> Adapter:
    """The model as a model under study; what already is one is returned as it is.

    Adapters register the classes of models that they are for. Raises `ValueError` for others.
    """
    if not hasattr(model, "expert_weights"):
        raise ValueError(
            f"model is a {type(model).__name__}; load a checkpoint with analysis.load(path), or "
            "wrap a cartmoe.LanguageModel with analysis.adapt(model, tokenizer)"
        )
    return model


class DenseRouting:
    """A decision as vectors over the experts: weights (T, E), who is used (T, E), how many (T,)."""

    def __init__(self, routing: Routing):
        zeros_TE = torch.zeros_like(routing.scores_TE, dtype=routing.weights_TK.dtype)
        self.weights_TE = zeros_TE.scatter_add_(-1, routing.ids_TK, routing.weights_TK)
        # Weights are never negative: an expert is used exactly if its summed weight is not 0.
        self.used_TE = self.weights_TE != 0
        self.count_T = self.used_TE.sum(-1)


def clean_routing(model: Adapter, tokens_BL: Tensor) -> tuple[Routing, ...]:
    """What every router decides on these tokens when nobody disturbs it, in order of depth."""
    state = State(None, tokens_BL)
    with torch.no_grad():
        for segment in model.segments():
            state = segment.run(state)
        model.check()
    return state.decisions


def routed_adapter(model: object) -> Adapter:
    """The model as a model under study; `ValueError` if it is dense."""
    model = as_adapter(model)
    if not model.sites():
        raise ValueError(f"{model.name} has no router: it is dense")
    return model


def check_documents(docs: Sequences, *models: Adapter) -> None:
    """Raise `ValueError` unless these are sequences of documents, at least one, in tokens that all
    of these models know."""
    if not isinstance(docs, Sequences):
        raise ValueError(f"docs is a {type(docs).__name__}; give what analysis.documents returns")
    if not len(docs):
        raise ValueError("docs has no sequence")
    largest = int(docs.tokens_SL.max())
    for model in models:
        if largest >= model.vocab_size:
            raise ValueError(
                f"docs has token {largest}, and {model.name} a vocabulary of {model.vocab_size}: "
                "take those of analysis.documents(corpus, model), which are in its own tokens"
            )
