"""Experts that are called all together, with hidden states, ids and weights of the chosen.

The decision is captured, and replaced, in that call: it is what they really receive. Shapes: T
tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.layouts import Weights, expert_weights
from analysis.adapters.seams import Places, argument, replaced, stream_of
from analysis.adapters.seat import Functions, Seat
from analysis.adapters.tap import Tap
from cartmoe.routing import Routing


@dataclass(kw_only=True)
class FusedSeat(Seat):
    """A seat whose router gives what its experts are called with.

    places   of that;  batched: hidden states as (B, L, D)
    fewest   slots that they can be called with
    """

    places: Places
    batched: bool
    fewest: int = 1
    tap: Tap | None = None

    def parts(self) -> Iterable[tuple[nn.Module, Callable]]:
        """The router, whose decision is taken where the experts are called."""
        return [(self.router.module, self._route), (self.experts, self._compute)]

    def _route(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.deciding:  # who decides asks the router itself
            return forward(*args, **kwargs)
        with Tap(self.router.roles) as self.tap:
            result = forward(*args, **kwargs)
        self.tap.check(self.site.name)
        return result

    def _compute(self, forward: Callable, *args: Any, **kwargs: Any) -> Tensor:
        tap, self.tap = self.tap, None
        self.calls += 1
        if tap is None:
            raise RuntimeError(
                f"experts of {self.site.name} were called without it: something was put in its "
                "place since the model was attached"
            )
        x, ids_TK, weights_TK = (argument(args, kwargs, key) for key in self.places)
        if ids_TK.shape[-1] != self.site.top_k:
            raise RuntimeError(
                f"{self.site.name} chooses {ids_TK.shape[-1]} experts where it chose "
                f"{self.site.top_k} when the model was attached; attach it again"
            )
        given = self.router.routing(tap, ids_TK, weights_TK)
        self.num_nonfinite = (~given.logits_TE.isfinite()).any(-1).sum()

        def own(x_TD: Tensor, routing: Routing) -> Tensor:
            if routing is given:
                return forward(*args, **kwargs).reshape(x_TD.shape)
            weights = routing.weights_TK.to(weights_TK.dtype)
            new = dict(zip(self.places, (x_TD.view(x.shape), routing.ids_TK, weights), strict=True))
            changed, named = replaced(args, kwargs, new)
            return forward(*changed, **named).reshape(x_TD.shape)

        x_TD = x.reshape(-1, x.shape[-1])
        routing, compute = self.decided(given, x_TD, own)
        return compute(x_TD, routing).view(x.shape)

    def outputs(self, x_TD: Tensor, ids: Iterable[int]) -> Tensor:
        """(len(ids), T, D): what the experts make of all tokens, one of them at a time; zeros for
        what is chosen like an expert and is none."""
        real = max(len(p) for p in self.experts.parameters(recurse=False) if p.ndim == 3)
        # A slot more, without weight: longcat_flash cannot do with one.
        one_T2 = torch.tensor([1, 0], dtype=x_TD.dtype, device=x_TD.device).expand(len(x_TD), 2)
        one_TK = one_T2[:, : self.fewest]
        own = self.standing[1].own if self.functions else self.experts  # called: weights may come
        x, found = x_TD[None] if self.batched else x_TD, []
        for e in ids:
            ids_TK = torch.full_like(one_TK, min(e, real - 1), dtype=torch.int64)
            args, kwargs = self.places.arguments(x, ids_TK, one_TK)
            output_TD = own(*args, **kwargs).view(x_TD.shape)
            found.append(output_TD if e < real else torch.zeros_like(x_TD))
        return torch.stack(found)

    def weights(self) -> Weights:
        """See `layouts`."""
        return expert_weights(self.experts, self.site.num_experts)

    def combine(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): what the stage makes of it when its experts give this."""
        if self.stage is self.experts:
            return routed_TD
        with self.alone(Functions(experts=lambda *_: routed_TD)):
            result = self.block_call.again(self.block, len(x_TD), x_TD)
        return stream_of(result).view(x_TD.shape)
