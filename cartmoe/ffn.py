"""The feed-forward half of a decoder layer: dense, one-stage MoE, or a Cartesian product of stages.

Shapes: T tokens, D model. Every layer maps the residual stream u_TD to the next one, as a list of
steps; a step is what can be run, skipped or repeated alone (see `model.Trunk.steps`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cartmoe.config import ModelConfig
from cartmoe.experts import RoutedExperts
from cartmoe.routing import LinearGate, Router, Routing

FFNStep = Callable[[Tensor, Tensor], tuple[Tensor, tuple[Routing, ...]]]


class DenseFFN(nn.Module):
    """SwiGLU without bias: down(silu(gate(x)) * up(x)); gate and up stand in one matrix."""

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D)."""
        gate, up = self.gate_up(x_TD).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class RoutedStage(nn.Module):
    """Router, routed experts and, if there is one, the shared expert with its mix.

    c = softmax(mix h + b);  out = c_0 * routed(h) + c_1 * shared(h)   (paper.md, "shared mix").
    The paper's fine-grained shared expert, the mean of `grain` narrow FFNs, is one FFN of the joint
    width divided by `grain`.
    """

    router_class, experts_class = Router, RoutedExperts

    def __init__(self, config: ModelConfig, stage: int, table_gate: nn.Module | None):
        super().__init__()
        E, width = config.num_experts, config.expert_width
        self.router = self.router_class(
            table_gate or LinearGate(config.d_model, E),
            E,
            config.top_k[stage],
            top_p=config.top_p,
            renormalize=config.renormalizes(stage),
            score=config.score,
            noise=config.router_noise,
        )
        self.experts = self.experts_class(E, config.d_model, width)
        self.grain = config.grain
        self.shared: DenseFFN | None = None
        if config.shared_experts:
            self.shared = DenseFFN(config.d_model, width * config.grain)
            self.mix = nn.Linear(config.d_model, 2)

    def forward(self, h_TD: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Routing]:
        """(T, D) to be added to the residual stream, and the decision taken."""
        routing = self.router(h_TD, token_ids_T)
        return self.output(h_TD, routing), routing

    def output(self, h_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) that this decision adds to the residual stream."""
        return self.combine(h_TD, self.experts(h_TD, routing))

    def combine(self, h_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): the routed experts' output, mixed with the shared expert's if there is one."""
        if self.shared is None:
            return routed_TD
        c = self.mix(h_TD).softmax(-1).to(routed_TD.dtype)
        return c[:, :1] * routed_TD + (c[:, 1:] / self.grain) * self.shared(h_TD)


class DenseLayer(nn.Module):
    """u + FFN(norm(u))."""

    def __init__(self, config: ModelConfig, table_gate: nn.Module | None = None):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = DenseFFN(config.d_model, config.ffn_width)

    def step(self, u_TD: Tensor, token_ids_T: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """The whole layer."""
        return u_TD + self.ffn(self.norm(u_TD)), ()

    def steps(self) -> list[FFNStep]:
        """The layer as a list of one."""
        return [self.step]


class MoELayer(nn.Module):
    """One stage: u + stage(norm(u)). Several in sequence are the Cartesian product layer:

    v = u + stage_0(norm_0(u));  out = v + stage_1(norm_1(v)); ...      (paper.md, "Equations")

    With composition "parallel" all stages read norm_0(u), and their outputs are added.
    """

    stage_class = RoutedStage

    def __init__(self, config: ModelConfig, table_gate: nn.Module | None = None):
        super().__init__()
        self.parallel = config.composition == "parallel"
        stages = range(config.num_stages)
        self.stages = nn.ModuleList(self.stage_class(config, s, table_gate) for s in stages)
        self.norms = nn.ModuleList(
            nn.RMSNorm(config.d_model, eps=config.norm_eps)
            for _ in range(1 if self.parallel else config.num_stages)
        )

    def steps(self) -> list[FFNStep]:
        """One step a stage; parallel stages share one."""
        if self.parallel:
            return [self._parallel_step]

        def step(norm, stage):
            def run(u_TD, token_ids_T):
                delta_TD, routing = stage(norm(u_TD), token_ids_T)
                return u_TD + delta_TD, (routing,)

            return run

        return [step(n, s) for n, s in zip(self.norms, self.stages, strict=True)]

    def _parallel_step(self, u_TD, token_ids_T):
        h_TD = self.norms[0](u_TD)
        deltas, routings = zip(*(s(h_TD, token_ids_T) for s in self.stages), strict=True)
        return u_TD + torch.stack(deltas).sum(0), routings


# By the name that `config.Family.ffn` gives; a family's unrouted layers are always "dense".
FFNS: dict[str, type[DenseLayer | MoELayer]] = {"dense": DenseLayer, "moe": MoELayer}
