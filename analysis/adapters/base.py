"""What a model under study must offer, whoever made it.

Shapes: B batch, L length, T = B * L tokens, D model, E experts, F expert width, K slots,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cartmoe.hooks import RouterSite
from cartmoe.routing import Routing


class State(NamedTuple):
    """The stream between two segments. Segments make new states and change none."""

    hidden_BLD: Any  # Tensor; None before the embedding
    tokens_BL: Tensor
    decisions: tuple[Routing, ...] = ()  # of the sites passed so far, in order


class Segment(NamedTuple):
    """One step of the model, state -> state, and the sites whose routers run in it."""

    name: str
    run: Callable[[State], State]
    sites: tuple[RouterSite, ...] = ()


class Router(Protocol):
    """What decides at one site, and answers for itself: nobody outside knows its rule.

    gate        (x_TD, token_ids_T) -> logits_TE, whatever hooks there are: `GateSwap`
    rows        (E, D) that logits are inner products with, None where there are none:
                router_cosine
    facts       what tables print of it: top_k (NaN where the number varies), renormalize (0, 1),
                num_experts
    by_logits   whether it uses the top_k highest logits, whatever else they are: `flip_prediction`
    """

    @property
    def gate(self) -> Callable[[Tensor, Tensor], Tensor]: ...

    @property
    def rows(self) -> Tensor | None: ...

    @property
    def facts(self) -> dict[str, float]: ...

    @property
    def by_logits(self) -> bool: ...

    def score(self, logits_TE: Tensor) -> Tensor:
        """(T, E) >= 0; a logit of -inf gives 0: point "scores" works on them."""
        ...

    def route(self, logits_TE: Tensor) -> Routing:
        """The decision that these logits lead to, whatever entered the router."""
        ...

    def decide(self, logits_TE: Tensor, scores_TE: Tensor, k: int | None = None) -> Routing:
        """The decision that these scores lead to, never an expert of score 0 with weight; the
        logits are only kept beside it. k: experts to use in place of the router's own rule."""
        ...

    def weigh(self, scores_TE: Tensor, ids_TK: Tensor, used_TK: Tensor | None = None) -> Tensor:
        """(T, K) weights of a set of experts. used_TK: its slots that are in use (None: as many
        as the router's own rule makes of them); others have weight 0."""
        ...

    def margin(self, routing: Routing, count_T: Tensor) -> Tensor:
        """(T,) how far a decision that uses count_T experts is from another set, in what decides
        it; 0 if all are used."""
        ...


class Given(NamedTuple):
    """The tokens that one forward of the whole model is given.

    position_BL   of each in its sequence, which padding before it does not count in
    real_BL       which are no padding; None: all
    past          how many a row earlier forwards have left in a cache
    surely_BL     which cannot be padding; None: those of real_BL
    cache         what earlier forwards left, and this one adds to
    """

    tokens_BL: Tensor
    position_BL: Tensor
    real_BL: Tensor | None = None
    past: int = 0
    surely_BL: Tensor | None = None
    cache: Any = None

    @classmethod
    def whole(cls, tokens_BL: Tensor) -> Given:
        """Sequences from their beginning, no padding among them."""
        position_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        return cls(tokens_BL, position_L.expand_as(tokens_BL))


# What a forward of the whole model is given, None behind it; the cache that it leaves.
ForwardFunction = Callable[[Given | None, Any], None]
# (decision, router, site, what enters the router (T, D)) -> another decision; None: as it is.
RouterFunction = Callable[[Routing, Router, RouterSite, Tensor], Routing | None]
# (what enters the routed experts (T, D), decision) -> the weighted sum of their outputs (T, D).
Experts = Callable[[Tensor, Routing], Tensor]
# The same, the site, and the experts' own; None: as they compute it.
ExpertsFunction = Callable[[Tensor, Routing, RouterSite, Experts], Tensor | None]
# (what the stage adds to the stream (T, D), site) -> what it adds instead; None: as it is.
OutputFunction = Callable[[Tensor, RouterSite], Tensor | None]


class Adapter(Protocol):
    """A model under study.

    name, family, train_seed   what tables and figures call it
    identity     SHA-256 of its weights' files, or of its tensors for an object in memory: cells
    tokenizer    with `encode` and `num_bytes` (see cartmoe.tokenizers), or None: documents
    device       where its weights are, and batches go
    vocab_size   V: documents are checked by it, and losses taken so many rows at a time
    width        D: tables of expert outputs
    module       the torch model, which one measures at a time: `owned`
    composed     False, if it is there, where `stage_input` is not known: no composed experts
    streamed     True, if it is there, where weights come and go, segment by segment
    """

    name: str
    family: str
    train_seed: int
    tokenizer: Any
    vocab_size: int
    width: int

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def identity(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def sites(self) -> list[RouterSite]:
        """Every router in order of depth."""
        ...

    def segments(self) -> list[Segment]:
        """Ordered steps whose composition is the model up to, not including, the head. The last one
        raises `FloatingPointError` if router logits were not finite in this forward."""
        ...

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32: the head, on any rows of the last segment's hidden states."""
        ...

    def hooked(
        self,
        *,
        forward: ForwardFunction | None = None,
        router: RouterFunction | None = None,
        experts: ExpertsFunction | None = None,
        output: OutputFunction | None = None,
        where: Callable[[RouterSite], bool] | None = None,
    ) -> AbstractContextManager:
        """Within the block, at these sites (None: all), what is given acts: `router` on decisions
        (conditions); `experts` in the experts' place (tables of outputs, gradients by them);
        `output` on what a stage adds to the stream, shared expert included (`ResidualNoise`).
        forward(given, None) is called before each forward of the whole model, and behind it
        forward(None, the cache that it leaves, if there is one) (`perturbed`).

        Only the thread and asyncio task that entered the block may run the model in it; for others
        a forward raises `ValueError`. Copies of the model that are made in it are as without it.

        Blocks nest; of several the one entered last acts last, and is asked first for the experts.
        """
        ...

    def router(self, site: RouterSite) -> Router:
        """The site's router."""
        ...

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """gate (E, F, D), up (E, F, D) and down (E, D, F) projections: metrics of weights."""
        ...

    def shared_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor] | None:
        """gate (F, D), up (F, D) and down (D, F) of the site's shared expert, as it stands in the
        stage's output before the mix; None where there is none. F may differ from the experts'."""
        ...

    def expert_outputs(
        self, site: RouterSite, x_TD: Tensor, ids: list[int] | None = None
    ) -> Tensor:
        """(E, T, D) outputs of all experts (or of those ids) on the same tokens, unweighted:
        metrics of outputs, tables, first-order damage."""
        ...

    def stage_input(self, site: RouterSite, stream_TD: Tensor) -> Tensor:
        """(T, D): what enters the site's router and experts when this is the residual stream:
        composed experts."""
        ...

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D) that the stage adds to the residual stream when its routed part gives this:
        c_0 routed + rest, c_0 a number a token (see `branches`)."""
        ...


@singledispatch
def as_adapter(model: Any) -> Adapter:
    """The model as a model under study; what already is one is returned as it is.

    Adapters register the classes of models that they are for. Raises `ValueError` for others.
    """
    if not hasattr(model, "expert_weights"):
        raise ValueError(
            f"model is a {type(model).__name__}; load a checkpoint with analysis.load(path), or "
            "wrap a model in memory with analysis.adapt(model, tokenizer)"
        )
    return model


def routed_adapter(model: object) -> Adapter:
    """The model as a model under study; `ValueError` if it is dense."""
    model = as_adapter(model)
    if not model.sites():
        raise ValueError(f"{model.name} has no router: it is dense")
    return model
