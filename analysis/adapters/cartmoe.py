"""The compact models of `cartmoe` as models under study."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.adapters.base import (
    EditFunction,
    ExpertsFunction,
    OutputFunction,
    RoutedFlow,
    Segment,
    State,
    as_adapter,
)
from cartmoe.ffn import RoutedStage
from cartmoe.hooks import RouterSite, hook_routers, router_sites, select_sites
from cartmoe.interrupt import restoring
from cartmoe.model import LanguageModel, Step
from cartmoe.routing import LinearGate, Router, Routing


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
    ):
        self.model = model
        self.family, self.width = model.config.family, model.config.d_model
        self.vocab_size = model.config.vocab_size
        self.name, self.train_seed, self.tokenizer = name or self.family, train_seed, tokenizer
        self._identity = identity

    @property
    def identity(self) -> str:
        """Of the checkpoint it was loaded from; else of the tensors, hashed when first asked."""
        if self._identity is None:
            self._identity = tensors_sha256(self.model)
        return self._identity

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

        def segment(step: Step) -> Segment:
            def run(state: State) -> State:
                hidden_BLD, taken = step.run(state.hidden_BLD, state.tokens_BL)
                return State(hidden_BLD, state.tokens_BL, state.decisions + taken)

            return Segment(step.name, run, tuple(site_of[r] for r in step.routers))

        return [segment(step) for step in self.model.trunk.steps()]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """(T, V) fp32."""
        return self.model.head(hidden_TD).float()

    def check(self) -> None:
        """Raise `FloatingPointError` naming layer and stage if router logits were not finite."""
        self.model.trunk.raise_nonfinite()

    @restoring
    def edit(
        self, fn: EditFunction, where: Callable[[RouterSite], bool] | None = None
    ) -> Iterator[dict[RouterSite, int]]:
        """`hook_routers`, with what enters the router as a fourth argument of fn."""
        inputs: dict[RouterSite, Tensor] = {}
        with ExitStack() as handles:
            for site, stage in select_sites(self.model, where).items():

                def remember(router, args, site=site):
                    inputs[site] = args[0]

                handles.callback(stage.router.register_forward_pre_hook(remember).remove)
            yield handles.enter_context(
                hook_routers(
                    self.model,
                    lambda routing, router, site: fn(routing, router, site, inputs.pop(site)),
                    where,
                )
            )

    def router(self, site: RouterSite) -> Router:
        """The site's router."""
        return self._stage(site).router

    def gate(self, site: RouterSite) -> Callable[[Tensor, Tensor], Tensor]:
        """The router's gate."""
        return self._stage(site).router.gate

    def _stage(self, site: RouterSite) -> RoutedStage:
        return select_sites(self.model, site.__eq__)[site]

    @restoring
    def edit_output(
        self, fn: OutputFunction, where: Callable[[RouterSite], bool] | None = None
    ) -> Iterator[None]:
        """Through hooks on the routed stages."""
        with ExitStack() as handles:
            for site, stage in select_sites(self.model, where).items():

                def hook(stage, args, out, site=site):
                    output_TD, routing = out
                    changed_TD = fn(output_TD, args[0], routing, site)
                    return None if changed_TD is None else (changed_TD, routing)

                handles.callback(stage.register_forward_hook(hook).remove)
            yield

    def stage_output(self, site: RouterSite, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D), without a hook on the experts taking notice."""
        stage = self._stage(site)
        return stage.combine(x_TD, stage.experts.forward(x_TD, routing))

    @restoring
    def replace_experts(self, site: RouterSite, fn: ExpertsFunction) -> Iterator[None]:
        """Through the instance's own `forward`, so that hooks on the experts still fire. Blocks
        nest and interleave; of those that are open the one entered last is asked first."""
        experts = self._stage(site).experts
        before = vars(experts).get("forward")
        stand_in = before if isinstance(before, _StandIn) else _StandIn(experts.forward, before)
        experts.forward = stand_in
        key = object()
        stand_in.functions[key] = fn
        try:
            yield
        finally:
            del stand_in.functions[key]
            if not stand_in.functions and vars(experts).get("forward") is stand_in:
                del experts.forward
                if stand_in.before is not None:
                    experts.forward = stand_in.before

    @restoring
    def watch_experts(self) -> Iterator[dict[RouterSite, RoutedFlow]]:
        """Through hooks on the routed experts."""
        seen: dict[RouterSite, RoutedFlow] = {}
        with ExitStack() as handles:
            for site, stage in select_sites(self.model, None).items():

                def hook(experts, args, out, site=site):
                    seen[site] = RoutedFlow(*args, out)

                handles.callback(stage.experts.register_forward_hook(hook).remove)
            yield seen

    @restoring
    def on_forward(self, fn: Callable[[Tensor], None]) -> Iterator[None]:
        """Through a pre-hook on the trunk, which every way of running the model calls."""
        handle = self.model.trunk.register_forward_pre_hook(lambda trunk, args: fn(args[0]))
        try:
            yield
        finally:
            handle.remove()

    @restoring
    def watch_branches(self) -> Iterator[dict[RouterSite, tuple[Tensor, Tensor]]]:
        """Share c_0 is 1 where there is no shared expert."""
        seen: dict[RouterSite, tuple[Tensor, Tensor]] = {}
        shares: dict[RouterSite, Tensor] = {}
        with ExitStack() as handles:
            stages = select_sites(self.model, None) if self.sites() else {}
            for site, stage in stages.items():

                def on_mix(mix, args, out, site=site):
                    shares[site] = out.detach().softmax(-1)[:, 0]

                def on_experts(experts, args, out, site=site):
                    norm_T = out.detach().float().norm(dim=-1)
                    seen[site] = (torch.ones_like(norm_T), norm_T)

                def on_stage(module, args, out, site=site):
                    if site in shares:
                        share_T = shares.pop(site)
                        seen[site] = (share_T, share_T * seen[site][1])

                if stage.mix is not None:
                    handles.callback(stage.mix.register_forward_hook(on_mix).remove)
                handles.callback(stage.experts.register_forward_hook(on_experts).remove)
                handles.callback(stage.register_forward_hook(on_stage).remove)
            yield seen

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

    def router_rows(self, site: RouterSite) -> Tensor | None:
        """(E, D); None for a table."""
        gate = self._stage(site).router.gate
        return gate.weight if isinstance(gate, LinearGate) else None

    def stage_input(self, site: RouterSite, stream_TD: Tensor) -> Tensor:
        """(T, D): the stage's norm."""
        layer = self.model.trunk.blocks[site.layer].ffn
        return layer.norms[0 if layer.parallel else site.stage](stream_TD)

    def combine(self, site: RouterSite, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): mixed with the shared expert."""
        return self._stage(site).combine(x_TD, routed_TD)

    def site_facts(self, site: RouterSite) -> dict[str, float]:
        """top_k (NaN with a top-p router, whose number varies), renormalize (0/1), num_experts."""
        router = router_sites(self.model)[site]
        top_k = float("nan") if router.top_p else router.top_k
        return {
            "top_k": top_k,
            "renormalize": float(router.renormalize),
            "num_experts": router.num_experts,
        }


@as_adapter.register
def _(model: LanguageModel) -> CartMoEAdapter:
    return CartMoEAdapter(model)


class _StandIn:
    """Stands where an instance's `forward` does, for all blocks that replace it.

    own      what is asked where none of their functions answers
    before   what the instance had there of its own, None for its class's
    """

    def __init__(self, own: ExpertsFunction, before: ExpertsFunction | None):
        self.own, self.before = own, before
        self.functions: dict[object, ExpertsFunction] = {}  # in order of entry

    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        answers = (fn(x_TD, routing) for fn in reversed(self.functions.values()))
        output_TD = next((answer for answer in answers if answer is not None), None)
        return self.own(x_TD, routing) if output_TD is None else output_TD


def tensors_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
