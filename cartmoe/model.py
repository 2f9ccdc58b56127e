"""The language model: embedding -> decoder blocks -> norm (the trunk) -> head.

Shapes: B batch, L length, T = B * L tokens, D model, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cartmoe.config import FAMILIES, ModelConfig
from cartmoe.ffn import FFNS, RoutedStage
from cartmoe.losses import mean_loss, token_losses
from cartmoe.routing import Router, Routing, TableGate, raise_nonfinite


class Step(NamedTuple):
    """One step of the trunk: (x_BLD, tokens_BL) -> (x_BLD, routings taken on the way)."""

    name: str  # "embed", "attention_3", "stage_4_1" (layer, stage), "ffn_1" (dense), "norm"
    run: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Routing, ...]]]
    routers: tuple[Router, ...] = ()


def rotate(x_Ld: Tensor, base: float, position_L: Tensor | None = None) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of (..., L, d), channel i paired with i + d/2
    as in LLaMA; position_L (..., L): default 0, 1, ..."""
    length, width = x_Ld.shape[-2:]
    device = x_Ld.device
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    if position_L is None:
        position_L = torch.arange(length, device=device)
    angle = position_L[..., None].float() * frequency
    cos, sin = angle.cos().to(x_Ld.dtype), angle.sin().to(x_Ld.dtype)
    a, b = x_Ld.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Causal multi-head attention without biases; query, key and value stand in one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.d_model
        self.num_heads, self.rope_base = config.num_heads, config.rope_base
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def heads(
        self, x_BLD: Tensor, position_L: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (B, H, L, d) each; see `rotate`."""
        B, L, D = x_BLD.shape
        heads = self.qkv(x_BLD).view(B, L, 3, self.num_heads, D // self.num_heads)
        heads = heads.permute(2, 0, 3, 1, 4)
        q, k = rotate(heads[:2], self.rope_base, position_L)
        v = heads[2].contiguous()  # as q and k are: the kernel is slow on a mixture
        return q, k, v

    def merge(self, y_BHLd: Tensor) -> Tensor:
        """(B, L, D) of what the heads found."""
        return self.out(y_BHLd.transpose(1, 2).flatten(2))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D)."""
        return self.merge(F.scaled_dot_product_attention(*self.heads(x_BLD), is_causal=True))


class Block(nn.Module):
    """x + attention(norm(x)), then the feed-forward half."""

    def __init__(self, config: ModelConfig, layer: int, table_gate: nn.Module | None):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        kind = FAMILIES[config.family].ffn if config.is_moe(layer) else "dense"
        self.ffn = FFNS[kind](config, table_gate)

    def attend(self, x_BLD: Tensor, tokens_BL: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """The attention step."""
        return x_BLD + self.attention(self.norm(x_BLD)), ()


class Trunk(nn.Module):
    """All but the head. Its forward is nothing but its `steps`, one after the other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        table_gate = None
        if config.gate == "table":
            table_gate = TableGate(config.vocab_size, config.num_experts, config.hash_seed)
        blocks = [Block(config, layer, table_gate) for layer in range(config.num_layers)]
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def steps(self) -> list[Step]:
        """The trunk as ordered steps. The first takes no x; after the last one x is normed."""
        steps = [Step("embed", lambda x, tokens: (self.embed(tokens), ()))]
        for layer, block in enumerate(self.blocks):
            steps.append(Step(f"attention_{layer}", block.attend))
            stages = [m for m in block.ffn.modules() if isinstance(m, RoutedStage)]
            ffn_steps = block.ffn.steps()
            for s, run in enumerate(ffn_steps):
                own = stages[s : s + 1] if len(ffn_steps) == len(stages) else stages
                name = f"stage_{layer}_{s}" if stages else f"ffn_{layer}"
                steps.append(Step(name, _over_tokens(run), tuple(stage.router for stage in own)))
        steps.append(Step("norm", lambda x, tokens: (self.norm(x), ())))
        return steps

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
        """(B, L, D) normed hidden states, and the routings in order of depth.

        Raises `FloatingPointError` naming layer and stage if router logits are not finite.
        """
        x: Any = None
        routings: tuple[Routing, ...] = ()
        for step in self.steps():
            x, taken = step.run(x, tokens_BL)
            routings += taken
        self.raise_nonfinite()
        return x, routings

    def raise_nonfinite(self) -> None:
        """Raise if a gate's own output was not finite in the last forward; synchronises once."""
        raise_nonfinite(
            [
                (f"layer {layer} stage {s}", stage.router)
                for layer, block in enumerate(self.blocks)
                for s, stage in enumerate(getattr(block.ffn, "stages", ()))
            ]
        )


def _over_tokens(run):
    """A feed-forward step on (T, D) as one on (B, L, D)."""

    def on_batch(x_BLD, tokens_BL):
        y_TD, routings = run(x_BLD.flatten(0, 1), tokens_BL.flatten())
        return y_TD.view_as(x_BLD), routings

    return on_batch


class LanguageModel(nn.Module):
    """A decoder-only language model of any family; weights are drawn by torch's own generator."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of std `init_std`; norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.init_std)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """(B, L, V) next-token logits of (B, L) token ids."""
        x_BLD, _ = self.trunk(tokens_BL)
        return self.head(x_BLD)

    def mean_loss(self, x_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """Scalar: mean nats of the targets given the trunk's output; differentiable."""
        return mean_loss(x_BLD.flatten(0, 1), self.head.weight, targets_BL.flatten())

    def losses(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """(B, L) fp32 nats of each target, 0 where it is -100. For evaluation: no gradient."""
        with torch.no_grad():
            x_BLD, _ = self.trunk(tokens_BL)
        nll_T = token_losses(x_BLD.flatten(0, 1), self.head.weight, targets_BL.flatten())
        return nll_T.view_as(targets_BL)

    def num_parameters(self, active: bool = False) -> int:
        """All parameters, or those that one token uses: all but its unchosen routed experts."""
        total = sum(p.numel() for p in self.parameters())
        if active:
            for stage in self.modules():
                if isinstance(stage, RoutedStage):
                    of_one = sum(p[0].numel() for p in stage.experts.parameters())
                    total -= (self.config.num_experts - stage.router.top_k) * of_one
        return total
