"""The compact models of `cartmoe` as models under study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters.base import (
    ExpertsFunction,
    ForwardFunction,
    Given,
    OutputFunction,
    RouterFunction,
    Segment,
    State,
    as_adapter,
)
from analysis.adapters.card import model_card
from analysis.adapters.identity import tensors_sha256
from analysis.adapters.stand_in import standing_in
from cartmoe.ffn import RoutedStage
from cartmoe.hooks import Hook, RouterSite, hook_routers, router_sites, select_sites
from cartmoe.interrupt import restoring
from cartmoe.model import LanguageModel, Step
from cartmoe.routing import Router


class CartMoEAdapter:
    """See `analysis.adapters.base.Adapter`."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        train_seed: int = 0,
        identity: str | None = None,
        trained_on: Mapping[str, Any] | None = None,
    ):
        """identity, trained_on: those of the checkpoint that it was loaded from, its "meta"."""
        self.model, self.trained_on = model, trained_on or {}
        self.family, self.width = model.config.family, model.config.d_model
        self.vocab_size = model.config.vocab_size
        self.name, self.train_seed, self.tokenizer = name or self.family, train_seed, tokenizer
        # Of a checkpoint, for as long as the model's tensors are those that were read from it.
        self._loaded = {tensors_sha256(model): identity} if identity else {}

    def __repr__(self) -> str:
        size = f"{self.model.num_parameters():,} parameters, {len(self.sites())} routers"
        return f"CartMoEAdapter({self.name}: {self.family}, {size}, train_seed {self.train_seed})"

    def _repr_html_(self) -> str:
        return model_card(self)

    @property
    def module(self) -> LanguageModel:
        """The model itself."""
        return self.model

    @property
    def identity(self) -> str:
        """Of the checkpoint whose tensors it has, or else of the tensors, hashed when asked."""
        found = tensors_sha256(self.model)
        return self._loaded.get(found, found)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.head.weight.device

    def sites(self) -> list[RouterSite]:
        """Every router in order of depth."""
        return list(router_sites(self.model))

    def segments(self) -> list[Segment]:
        """The trunk's steps: embed, attention_0, stage_0_0, ..., norm."""
        site_of = {router: site for site, router in router_sites(self.model).items()}
        steps = self.model.trunk.steps()

        def segment(step: Step) -> Segment:
            def run(state: State) -> State:
                hidden_BLD, taken = step.run(state.hidden_BLD, state.tokens_BL)
                if step is steps[-1]:
                    self.model.trunk.raise_nonfinite()
                return State(hidden_BLD, state.tokens_BL, state.decisions + taken)

            return Segment(step.name, run, tuple(site_of[r] for r in step.routers))

        return [segment(step) for step in steps]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32."""
        return self.model.head(hidden_TD).float()

    @restoring
    def hooked(
        self,
        *,
        forward: ForwardFunction | None = None,
        router: RouterFunction | None = None,
        experts: ExpertsFunction | None = None,
        output: OutputFunction | None = None,
        where: Callable[[RouterSite], bool] | None = None,
    ) -> Iterator[None]:
        """Through hooks, and the experts' own `forward`, so that hooks on the experts still fire.

        Raises `ValueError` for a compiled model and where `where` selects nothing, `RuntimeError`
        for routers that did not run inside the block (see `cartmoe.hooks.hook_routers`).
        """
        inputs: dict[RouterSite, Tensor] = {}
        at_sites = any(fn is not None for fn in (router, experts, output))
        stages = select_sites(self.model, where) if at_sites else {}
        with ExitStack() as stack:
            if forward:  # every way of running the model calls its trunk
                trunk = self.model.trunk
                begin = Hook(
                    lambda _, args, named: forward(Given.whole(*args, *named.values()), None)
                )
                end = Hook(lambda *_: forward(None, None), refuse=False)  # also behind a refusal
                stack.callback(trunk.register_forward_pre_hook(begin, with_kwargs=True).remove)
                stack.callback(trunk.register_forward_hook(end, always_call=True).remove)
            for site, stage in stages.items():

                def enters(_, args, site=site):
                    inputs[site] = args[0]

                def leaves(_, args, out, site=site):
                    changed_TD = output(out[0], site)
                    return None if changed_TD is None else (changed_TD, out[1])

                if router:
                    stack.callback(stage.router.register_forward_pre_hook(Hook(enters)).remove)
                if output:
                    stack.callback(stage.register_forward_hook(Hook(leaves)).remove)
                if experts is not None:
                    stack.enter_context(standing_in(stage.experts, experts, site))
            if router:
                stack.enter_context(
                    hook_routers(
                        self.model,
                        lambda routing, own, site: router(routing, own, site, inputs.pop(site)),
                        where,
                    )
                )
            yield

    def router(self, site: RouterSite) -> Router:
        """The site's router."""
        return self._stage(site).router

    def _stage(self, site: RouterSite) -> RoutedStage:
        return select_sites(self.model, site.__eq__)[site]

    def expert_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor]:
        """gate (E, F, D), up (E, F, D), down (E, D, F); views, not copies."""
        experts = self._stage(site).experts
        gate_EFD, up_EFD = experts.gate_up_ECD.chunk(2, dim=1)
        return gate_EFD, up_EFD, experts.down_EDF

    def expert_outputs(
        self, site: RouterSite, x_TD: Tensor, ids: list[int] | None = None
    ) -> Tensor:
        """(E, T, D), or (len(ids), T, D); one expert after the other, so that temporaries of one
        are all there is beside the result."""
        experts = self._stage(site).experts
        outputs = []
        for e in range(experts.num_experts) if ids is None else ids:
            gate, up = F.linear(x_TD, experts.gate_up_ECD[e]).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, experts.down_EDF[e]))
        return torch.stack(outputs)

    def shared_weights(self, site: RouterSite) -> tuple[Tensor, Tensor, Tensor] | None:
        """gate (F, D), up (F, D), down (D, F); the mean over `grain` is in the down projection."""
        stage = self._stage(site)
        if stage.shared is None:
            return None
        gate_FD, up_FD = stage.shared.gate_up.weight.chunk(2, dim=0)
        return gate_FD, up_FD, stage.shared.down.weight / stage.grain

    def stage_input(self, site: RouterSite, stream_TD: Tensor) -> Tensor:
        """(T, D): the stage's norm."""
        layer: Any = self.model.trunk.blocks[site.layer].ffn
        return layer.norms[0 if layer.parallel else site.stage](stream_TD)

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): mixed with the shared expert."""
        return self._stage(site).combine(x_TD, routed_TD)


@as_adapter.register
def _(model: LanguageModel) -> CartMoEAdapter:
    return CartMoEAdapter(model)
