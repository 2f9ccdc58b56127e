"""Experts that a block keeps in a list and calls one by one, choosing among them itself.

What it decides is read off its own code: with experts that give unit vectors, its output is their
weights. Shapes: T tokens, D model, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analysis.adapters.layouts import Weights, listed_weights
from analysis.adapters.seams import stream_of
from analysis.adapters.seat import Seat
from analysis.adapters.stream import in_place_of
from cartmoe.routing import Routing


class Stubbed(nn.Module):
    """A block as a router: it gives (ids (T, K), weights (T, K)) of what its experts receive.

    asking   whether it is run for that now
    """

    def __init__(self, block: nn.Module, experts: Sequence[nn.Module], top_k: int = 1):
        super().__init__()
        self.block, self.listed, self.top_k, self.asking = block, tuple(experts), top_k, False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The best first, as many slots as the token with most of them uses, or top_k."""
        # The model may be narrower than there are experts: then some at a time.
        firsts = range(0, len(self.listed), hidden_in(args, kwargs).shape[-1])
        # Before the rest, so that operations that are replaced are replaced here.
        each = [rows_of(self.run(first, *args, **kwargs)) for first in firsts]
        rest_TD = rows_of(self.run(None, *args, **kwargs))
        weights_TE = torch.cat([found_TD - rest_TD for found_TD in each], dim=1)
        weights_TE = weights_TE[:, : len(self.listed)]
        weights_TE, ids_TE = weights_TE.sort(dim=-1, descending=True, stable=True)
        most = max(self.top_k, int((weights_TE != 0).sum(-1).max()))
        return ids_TE[:, :most], weights_TE[:, :most]

    def run(self, first: int | None, *args: Any, **kwargs: Any) -> Any:
        """The block, where expert `first` gives the first unit vector and so on; None: zeros."""
        number = -len(self.listed) if first is None else -first
        forwards = {e: partial(_unit, number + i) for i, e in enumerate(self.listed)}
        with self.aside(), in_place_of(forwards):
            return self.block(*args, **kwargs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block nobody decides in its place."""
        before, self.asking = self.asking, True
        try:
            yield
        finally:
            self.asking = before


def _unit(number: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    made = torch.zeros_like(x)
    if 0 <= number < x.shape[-1]:
        made[..., number] = 1
    return made


def hidden_in(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a module is called with, which are all that it is called with."""
    found = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if not found:
        raise ValueError("it is called without hidden states")
    return found[0]


def rows_of(result: Any) -> Tensor:
    """(T, D) hidden states of what a block returned."""
    stream = stream_of(result)
    return stream.reshape(-1, stream.shape[-1])


@dataclass(kw_only=True)
class ListedSeat(Seat):
    """A seat whose block chooses and calls the experts, one after the other."""

    stubbed: Stubbed

    @property
    def stage(self) -> nn.Module:
        """The block."""
        return self.block

    def parts(self) -> Iterable[tuple[nn.Module, Callable]]:
        """What stands in the place of whose forward."""
        return [(self.block, self._stage)]

    def _stage(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.stubbed.asking:
            return forward(*args, **kwargs)
        self.calls += 1
        x = hidden_in(args, kwargs)
        x_TD = x.reshape(-1, x.shape[-1])
        given = self.given(x_TD)
        self.num_nonfinite = (~given.logits_TE.isfinite()).any(-1).sum()
        plain: list[Tensor] = []  # what the experts give by the block's own decision

        def own(into_TD: Tensor, routing: Routing) -> Tensor:
            routed_TD = self.computed(into_TD, routing)
            if routing is given and into_TD is x_TD:
                plain.append(routed_TD)
            return routed_TD

        routing, compute = self.decided(given, x_TD, own)
        if routing is given and compute is own:
            return forward(*args, **kwargs)
        routed_TD = compute(x_TD, routing)
        if any(routed_TD is made for made in plain) and not routed_TD.requires_grad:
            return forward(*args, **kwargs)  # to the last bit
        result = self.stubbed.run(None, *args, **kwargs)
        made = (rows_of(result) + routed_TD).view(x.shape)
        return (made, *result[1:]) if isinstance(result, tuple) else made

    def given(self, x_TD: Tensor) -> Routing:
        """The block's own decision, told from its logits alone, so that what else it adds (a shared
        expert) does not round the weights."""
        return self.router.route(self.router.gate(x_TD, torch.empty(0)))

    def computed(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D): every expert's part, of its own tokens."""
        output_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.stubbed.listed):
            t, k = ((routing.ids_TK == e) & (routing.weights_TK != 0)).nonzero(as_tuple=True)
            part_ND = expert(x_TD[t]) * routing.weights_TK[t, k, None].to(x_TD.dtype)
            output_TD = output_TD.index_add(0, t, part_ND.to(x_TD.dtype))
        return output_TD

    def outputs(self, x_TD: Tensor, ids: Iterable[int]) -> Tensor:
        """(len(ids), T, D): what the experts make of all tokens."""
        return torch.stack([self.stubbed.listed[e](x_TD) for e in ids])

    def weights(self) -> Weights:
        """See `layouts`."""
        return listed_weights(self.stubbed.listed)

    def combine(self, x_TD: Tensor, routed_TD: Tensor) -> Tensor:
        """(T, D): what the block makes of it when its experts give this."""

        def rest(*args: Any, **kwargs: Any) -> Tensor:
            return rows_of(self.stubbed.run(None, *args, **kwargs))

        return self.block_call.again(rest, len(x_TD), x_TD) + routed_TD
